# The image of Dataflow's workers, for `distill-jax corpus --runner DataflowRunner`. Python must be
# that of .venv-beam, and Beam too. From the checkout:
#   docker build -f scripts/launching/beam.Dockerfile -t IMAGE . && docker push IMAGE
ARG PYTHON=3.11
FROM apache/beam_python${PYTHON}_sdk:2.77.0
WORKDIR /distill_jax
COPY . .
RUN pip install --no-cache-dir --require-hashes \
    -r scripts/requirements/build.txt -r scripts/requirements/beam_worker.txt \
  && pip install --no-cache-dir --no-deps --no-build-isolation .
