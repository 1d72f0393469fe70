"""Draw architecture.svg: the rooms of dschat/ as floors, and the way of data through them.

    python docs/figures/architecture.py

A box has the colour of the room that does its work. The ground is white, so that the picture reads
on dark pages too.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, LEFT = 860, 24
FLOOR_HEIGHT, FLOOR_GAP = 34, 6
BOX_HEIGHT, ARROW = 52, 22
INK, QUIET, LINE = "#1f2328", "#57606a", "#8c959f"
COLOURS = {
    "users": "#f6f8fa",
    "api": "#f6f8fa",
    "command": "#f6f8fa",
    "pipeline": "#e6eaef",
    "compare": "#e6eaef",
    "chat": "#e6eaef",
    "plan": "#e6eaef",
    "quickstart": "#e6eaef",
    "merge": "#e6eaef",
    "checkpoint": "#e6eaef",
    "winrate": "#e6eaef",
    "push": "#e6eaef",
    "config": "#e3dcf5",
    "rlhf": "#fbd9d3",
    "train": "#fde3c4",
    "data": "#d3ebd3",
    "text": "#d5eef0",
    "models": "#d3e4f8",
    "report": "#e6eaef",
    "utils": "#fff1b8",
    "functional": "#f7d7e8",
    "settings": "#e6eaef",
    "rules": "#e6eaef",
    "errors": "#e6eaef",
    "lazy": "#e6eaef",
}

# From the top down: a room imports from the floors below it, and from nothing else.
FLOORS = (
    (("users", "training/ · inference/ · e2e_rlhf.py · chat.py", "recipes and programs"),),
    (("api", "api", "from Python: settings in, a run out; its figures, model, conversation"),),
    (("command", "command", "`dschat`: the registry of commands, completion, doctor"),),
    (
        ("pipeline", "pipeline", "stages from one file, resumed"),
        ("compare", "compare", "answers side by side"),
    ),
    (
        ("plan", "plan", ""),
        ("quickstart", "quickstart", ""),
        ("merge", "merge", ""),
        ("checkpoint", "checkpoint", ""),
        ("winrate", "winrate", ""),
        ("push", "push", ""),
    ),
    (("chat", "chat", "conversation with a model folder: prompts that fit, answers that stream"),),
    (("config", "config", "the flags of each step, from the settings of the rooms; CLI and YAML"),),
    (("rlhf", "rlhf", "roles, rollouts, rewards, advantages, the PPO update"),),
    (("train", "train", "engine, evaluation, metrics, checkpoints and resume"),),
    (("data", "data", "sources, readers, tokenised sets, batches"),),
    (
        ("text", "text", "tokenizer, prompt formats"),
        ("models", "models", "LM, reward model, saving"),
        ("report", "report", "the page of a run"),
    ),
    (("utils", "utils", "LoRA layers, LoRA+ groups, ZeRO, DeepSpeed's dict, throughput"),),
    (
        ("functional", "functional", "losses, returns"),
        ("settings", "settings", "declared once"),
    ),
    (
        ("rules", "rules", "bounds, choices"),
        ("errors", "errors", "one line"),
        ("lazy", "lazy", "late imports"),
    ),
)

# (room, what there is, what makes it)
WAYS = (
    (
        "settings",
        (
            ("users", "argv, YAML", "flags"),
            ("config", "frozen settings", "config/cli.py"),
            ("utils", "DeepSpeed dict", "utils/ds_utils.py"),
            ("utils", "LoRA+ groups", "utils/optim.py"),
            ("train", "engine", "train/engine.py"),
        ),
    ),
    (
        "steps 1, 2",
        (
            ("data", "source", "data/sources.py"),
            ("data", "Example", "data/readers.py"),
            ("data", "ids", "data/tokenise.py"),
            ("data", "batch", "data/collators.py"),
            ("functional", "loss", "losses.py"),
            ("models", "model folder", "models/save.py"),
        ),
    ),
    (
        "step 3",
        (
            ("data", "prompts", "data/batching.py"),
            ("rlhf", "rollout", "rlhf/generation.py"),
            ("rlhf", "Experience", "rlhf/rollout.py"),
            ("rlhf", "advantages", "rlhf/advantages.py"),
            ("rlhf", "update", "rlhf/ppo_trainer.py"),
            ("models", "model folder", "models/save.py"),
        ),
    ),
)


def _text(x: float, y: float, content: str, size: float = 12, **more: str) -> str:
    attributes = {"fill": INK} | {name.replace("_", "-"): value for name, value in more.items()}
    spelt = " ".join(f'{name}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" {spelt}>{escape(content)}</text>'


def _box(x: float, y: float, width: float, height: float, room: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" '
        f'fill="{COLOURS[room]}" stroke="{LINE}"/>'
    )


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{QUIET}" stroke-width="1.6" '
        'fill="none" marker-end="url(#tip)"/>'
    )


def _floors(top: float) -> tuple[list[str], float]:
    """Draw the floors; return their parts and where they end."""
    x, width = LEFT + 40, WIDTH - 2 * LEFT - 40
    parts, y = [], top
    for rooms in FLOORS:
        room_width = (width - FLOOR_GAP * (len(rooms) - 1)) / len(rooms)
        for i, (room, name, purpose) in enumerate(rooms):
            at = x + i * (room_width + FLOOR_GAP)
            parts.append(_box(at, y, room_width, FLOOR_HEIGHT, room))
            indent = 352 if room == "users" else 112
            parts.append(_text(at + 12, y + 22, name, 13, font_weight="bold"))
            parts.append(_text(at + indent, y + 22, purpose, 12, fill=QUIET))
        y += FLOOR_HEIGHT + FLOOR_GAP
    bottom = y - FLOOR_GAP
    middle = (top + bottom) / 2
    parts.append(_arrow(LEFT + 24, top + 4, LEFT + 24, bottom - 4))
    turned = f"rotate(-90 {LEFT + 14} {middle:g})"
    parts.append(
        _text(LEFT + 14, middle, "imports", 12, text_anchor="middle", fill=QUIET, transform=turned)
    )
    return parts, bottom


def _way(top: float, name: str, steps: tuple[tuple[str, str, str], ...]) -> list[str]:
    """Draw one row of boxes with arrows between them."""
    x = LEFT + 76
    width = (WIDTH - LEFT - x - ARROW * (len(steps) - 1)) / len(steps)
    middle = top + BOX_HEIGHT / 2
    parts = [_text(LEFT, middle + 4, name, 12, font_weight="bold")]
    for i, (room, what, maker) in enumerate(steps):
        at = x + i * (width + ARROW)
        centre = {"text_anchor": "middle"}
        parts.append(_box(at, top, width, BOX_HEIGHT, room))
        parts.append(_text(at + width / 2, top + 22, what, 13, font_weight="bold", **centre))
        parts.append(_text(at + width / 2, top + 40, maker, 10, fill=QUIET, **centre))
        if i:
            parts.append(_arrow(at - ARROW + 2, middle, at - 3, middle))
    return parts


def picture() -> str:
    """Return the SVG's text."""
    parts = [_text(LEFT, 32, "Rooms of dschat/: each imports from the floors below it", 15)]
    floors, bottom = _floors(48)
    parts += floors
    y = bottom + 42
    parts.append(_text(LEFT, y, "The way of data", 15))
    y += 16
    for name, steps in WAYS:
        parts += _way(y, name, steps)
        y += BOX_HEIGHT + 14
    loop = "every model folder is the next step's input, and what transformers and chat.py load"
    parts.append(_text(WIDTH - LEFT, y + 6, loop, 11.5, text_anchor="end", fill=QUIET))
    height = y + 24
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" '
        f'viewBox="0 0 {WIDTH} {height:g}" font-family="Helvetica, Arial, sans-serif" '
        'role="img" aria-label="Rooms of dschat and the way of data through them">',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" '
        f'markerHeight="6" orient="auto"><path d="M0 0L10 5L0 10z" fill="{QUIET}"/>'
        "</marker></defs>",
        f'<rect width="{WIDTH}" height="{height:g}" rx="8" fill="#ffffff"/>',
    )
    return "\n".join([*head, *parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
