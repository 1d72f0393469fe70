# dschat with CUDA: the image that every machine of a run starts.
#
#   docker build -t dschat .
#   docker run --gpus all --ipc host --ulimit memlock=-1 --network host -v /shared:/shared dschat \
#     dschat doctor
#
# The development image has nvcc, with which DeepSpeed compiles its optimizer for --offload and its
# quantiser when they are first used. torch is the pinned version's build for CUDA; where the
# package index has another by default, name its own: --build-arg TORCH_INDEX=URL.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PATH=/opt/venv/bin:$PATH

# ninja-build: kernels. iproute2, openssh-client, pdsh: `deepspeed --hostfile` finds the machines.
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      build-essential python3 python3-dev python3-venv ninja-build \
      iproute2 openssh-client pdsh \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/venv

WORKDIR /opt/dschat
ARG TORCH_INDEX=""
COPY constraints.txt ./
RUN pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY . .
RUN DS_BUILD_OPS=0 pip install -c constraints.txt . \
 && python -c "import torch; assert torch.version.cuda, 'torch has no CUDA: give TORCH_INDEX'"

# One thread a process unless told otherwise, as torchrun has it.
ENV OMP_NUM_THREADS=1
CMD ["dschat", "doctor"]
