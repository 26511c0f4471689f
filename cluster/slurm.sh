#!/usr/bin/env bash
# Starts Ray on every node of a Slurm allocation, submits a recipe as a Ray job and waits for it. From the repository's root:
#   sbatch cluster/slurm.sh jobs/recipes/llama31_8b.toml --run /shared/runs/llama31-8b [key=value ...]
# The same line again continues from what is committed, also after the time limit. The nodes share the checkout, the
# environment in .venv (or the one that EVOLVE_RAY_BIN names) and the run directory.
#SBATCH --job-name=evolve-ray
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --output=evolve-ray-%j.log
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch cluster/slurm.sh RECIPE.toml --run /shared/runs/NAME [key=value ...]" >&2
  exit 2
fi
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "error: this is no Slurm job; submit it with: sbatch cluster/slurm.sh $*" >&2
  exit 2
fi
here=${SLURM_SUBMIT_DIR:?}
bin=${EVOLVE_RAY_BIN:-$here/.venv/bin}
if ! [ -x "$bin/ray" ]; then
  echo "error: $bin/ray: is not there; install evolve-ray, or name its environment in EVOLVE_RAY_BIN" >&2
  exit 2
fi
export PATH="$bin:$PATH"

# One token for this job, readable by its owner only, on the storage that the nodes share.
private=$here/.evolve-ray-$SLURM_JOB_ID
mkdir -m 700 "$private"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$private/token"
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")

mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?}")
head=${nodes[0]}
port=$((20000 + SLURM_JOB_ID % 10000))
dashboard=$((port + 10000))
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
gpus=${SLURM_GPUS_ON_NODE:-8} cpus=${SLURM_CPUS_PER_TASK:-64}
steps=()
job=""

finish() {
  if [ -n "$job" ]; then ray job stop --address "http://127.0.0.1:$dashboard" "$job" || true; fi
  if [ ${#steps[@]} -gt 0 ]; then kill "${steps[@]}" 2>/dev/null || true; fi
  rm -rf "$private"
}
trap finish EXIT
trap 'echo "the time limit is near: stopping; submit the same line again to continue" >&2; exit 143' TERM

# A node: its number, and how Ray starts there.
start() {
  srun --nodes=1 --ntasks=1 --overlap --nodelist="${nodes[$1]}" --gpus-per-node="$gpus" \
    ray start "${@:2}" --block --num-cpus="$cpus" --num-gpus="$gpus" --disable-usage-stats &
  steps+=($!)
}

start 0 --head --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard"
for number in $(seq 1 $((${#nodes[@]} - 1))); do
  start "$number" --address="$address:$port"
done

# This script runs on the first node, beside the head.
alive() { ray list nodes --address "http://127.0.0.1:$dashboard" --filter state=ALIVE --format json 2>/dev/null | grep -c '"node_id"'; }
for ((waited = 0; $(alive || true) < ${#nodes[@]}; waited += 5)); do
  if [ "$waited" -ge 300 ]; then
    echo "error: after 300 s not all of the ${#nodes[@]} nodes have joined; see the lines above, then submit again" >&2
    exit 5
  fi
  sleep 5
done

job=evolve-ray-$SLURM_JOB_ID
cd "$here"
# In the background, so that the trap above is taken at once.
ray job submit --address "http://127.0.0.1:$dashboard" --submission-id "$job" --working-dir . -- \
  python jobs/iterate.py "$@" &
wait $!
job=""
