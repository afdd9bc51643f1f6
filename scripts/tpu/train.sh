#!/usr/bin/env bash
# Trains on a TPU pod; run it on your own machine, where gcloud is set up:
#
#   bash scripts/tpu/train.sh [flags of u2pl_jax.main]
#
# The same command again goes on with a run that was interrupted. Once, on every
# worker: clone the repository, and make .venv with the line for TPUs of
# requirements.txt.
set -euo pipefail

# -- Edit from here ------------------------------------------------------------
TPU=my-pod
ZONE=us-central2-b
# On every worker: the repository, and the data set of config.dataset.root.
REPOSITORY=u2pl_jax
# On a file system that all workers see, such as Filestore.
WORKDIR=/mnt/shared/runs/voc_1464
FLAGS=(--config=configs/voc_1464.py --config.model.dtype=bfloat16)
# -- to here -------------------------------------------------------------------

command="cd $(printf %q "$REPOSITORY") && exec .venv/bin/python -u \
  -m u2pl_jax.main $(printf '%q ' --workdir="$WORKDIR" "${FLAGS[@]}" "$@")"
# jax finds the other workers by itself.
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="$command"
