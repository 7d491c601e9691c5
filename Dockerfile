# An image with everything that training, inference and evaluation need on NVIDIA GPUs.
#
#   docker build -t stagewise .
#   docker run --gpus all --ipc host -v "$PWD/models:/stagewise/models" -v "$PWD/outputs:/stagewise/outputs" \
#       stagewise bash run_sft.sh
#
# torch's wheels bring their own CUDA libraries; the devel image has the compiler that DeepSpeed builds its CPU optimizer
# with (--deepspeed with offloading).
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends git python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN python3 -m venv "$VIRTUAL_ENV"

WORKDIR /stagewise
# The requirements first: a change of the code alone installs nothing again.
COPY requirements.txt requirements-web.txt requirements-evaluation.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -r requirements-web.txt -r requirements-evaluation.txt bitsandbytes \
    -c constraints.txt

COPY . .
RUN pip install --no-cache-dir --no-deps -e .
