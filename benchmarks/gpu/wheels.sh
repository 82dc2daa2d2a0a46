#!/usr/bin/env bash
# Collect what a GPU machine without a network lacks, as wheels: `bash benchmarks/gpu/wheels.sh FOLDER [PYTHON]`.
#
# Made for a machine that has torch 2.11+cu130, transformers 5.17, accelerate, pandas, pyarrow, matplotlib and pytest on
# Python 3.12; about 20 MB. Without --no-deps pip would bring another torch.
set -euo pipefail
folder=$1
python=${2:-python3.12}
mkdir -p "$folder"
cd "$folder"

"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
  --platform manylinux2014_x86_64 -d . \
  hydra-core==1.3.2 omegaconf==2.3.1 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 evaluate==0.4.6 \
  pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5 gguf==0.19.0 nltk==3.10.4 \
  peft==0.21.2 trl==1.16.0 liger-kernel==0.8.5 bitsandbytes==0.50.2
"$python" -m pip wheel -q --no-deps -w . antlr4-python3-runtime==4.9.3 rouge-score==0.1.2 # no wheels of their own

# bitsandbytes has a library for each version of CUDA, 20 MB apiece: only the one that torch has is carried
"$python" - bitsandbytes-*.whl <<'PYTHON'
import sys, zipfile
from pathlib import Path

whole = Path(sys.argv[1])
small = whole.with_suffix(".small")
with zipfile.ZipFile(whole) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
    for entry in old.infolist():
        name = Path(entry.filename).name
        if not name.startswith("libbitsandbytes_") or name in ("libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"):
            new.writestr(entry, old.read(entry))
small.replace(whole)
PYTHON
du -sh .
