"""Packaging of the `dschat` library and of the programs that the command `dschat` starts."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """Read `__version__` as text: importing dschat would need its dependencies."""
    text = (ROOT / "dschat" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('dschat/__init__.py has no line __version__ = "..."')
    return found.group(1)


def programs() -> dict[str, str]:
    """Map packages of the wheel to the folders whose programs they hold, as a checkout has them."""
    folders = ["inference", *(str(path) for path in sorted(Path("training").glob("step*")))]
    return {f"dschat.programs.{folder.replace('/', '.')}": folder for folder in folders}


def readme() -> str:
    """Return the README, or nothing in a tree without one."""
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


setup(
    name="dschat",
    version=version(),
    description="DeepSpeed-Chat today: SFT, reward model and PPO, with LoRA+",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="rlhf sft dpo ppo grpo reward-model lora lora-plus deepspeed llm",
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license_files=["LICENSE"],
    packages=[*find_packages(include=["dschat", "dschat.*"]), *programs()],
    package_dir=programs(),
    entry_points={"console_scripts": ["dschat = dschat.__main__:main"]},
    package_data={
        "dschat": [
            "py.typed",
            *("recipes/**/*.yaml", "recipes/**/*.json"),
            *("report/*.j2", "compare/*.j2", "compare/*.js"),
        ]
    },
    python_requires=">=3.11",
    # Lower bounds are what the tests run on (constraints.txt), but where an older release is
    # known to serve; upper bounds stand before the next release that may break an interface.
    install_requires=[
        "torch>=2.13,<3",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.23,<6",
        "datasets>=5.2,<6",
        "huggingface_hub>=2.4,<3",
        "filelock>=3.12",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "sentencepiece>=0.2.1",
        "numpy>=2",
        "packaging>=23",
        "pyarrow>=21",
        "pydantic>=2",
        "psutil>=5.9",
        "pyyaml>=6",
        "tqdm>=4.66",
        "tensorboard>=2.17",
        "jinja2>=3.1",
        "markupsafe>=2",
        "matplotlib>=3.10",
    ],
    extras_require={
        "test": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff>=0.15",
            "mypy>=2.4",
            "types-PyYAML",
            "types-tqdm",
            "peft>=0.19",
            "bitsandbytes>=0.49",
        ],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10"],
        "live": ["gradio>=6,<7"],
        "quantize": ["bitsandbytes>=0.49"],
        "wandb": ["wandb>=0.18"],
        "trackio": ["trackio>=0.5"],
    },
)
