# left_bench on the CPU: docker build -t left-bench . ; docs/cluster.md says how it is run
FROM python:3.11-slim-bookworm

RUN useradd --create-home --uid 1000 bench \
    && mkdir /cache /home/bench/runs /home/bench/reports \
    && chown bench:bench /cache /home/bench/runs /home/bench/reports
ENV LEFT_BENCH_CACHE=/cache/left_bench \
    HF_HOME=/cache/huggingface \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /src
# torch first: its layer is large and changes seldom
RUN pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY left_bench ./left_bench
COPY hydra_plugins ./hydra_plugins
COPY conf ./conf
COPY sweeps ./sweeps
RUN pip install '.[joblib,optuna,text-metrics,five-bit,digits]' -c constraints.txt

USER 1000
WORKDIR /home/bench
VOLUME ["/home/bench/runs", "/home/bench/reports", "/cache"]
ENTRYPOINT ["left-bench"]
CMD ["--help"]
