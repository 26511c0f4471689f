#!/usr/bin/env bash
# Two Ray nodes on this machine with a token, a job submitted from a clean clone, the second node killed while it generates and
# replaced by another; the job must succeed with the pairs of an undisturbed run on this machine alone. Then both nodes serve what
# came out, by cluster/serve.yaml with keys. Where Prometheus is
# installed it scrapes the nodes, and every panel of the Grafana dashboard is asked of it. Under ten minutes on two cores.
# `make cluster-smoke`, or: cluster/smoke.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
place=${1:-runs/cluster-smoke}
place=$(realpath -m "$place")
export PATH="$PWD/.venv/bin:$PATH"
unset RAY_ADDRESS
mkdir -p "$place"
rm -rf "$place/run" "$place/twin" "$place/clone" "$place/prometheus"

fail() {
  echo "error: $*" >&2
  exit 1
}

export RAY_scheduler_spread_threshold=0.1 # Ray fills half of a node before it takes another: here each gets an engine
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$place/token"
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
# Below 10002, where the ports of Ray's workers begin.
gcs=9579 dashboard=9581 scraper=9586 endpoint=9588
address=http://127.0.0.1:$dashboard
pids=()
# A process and everything below it.
family() {
  echo "$1"
  for child in $(pgrep -P "$1"); do family "$child"; done
}
finish() {
  # Only what was started here, by its id: other Ray clusters of this machine live on.
  for pid in "${pids[@]}"; do family "$pid" | xargs kill -TERM 2>/dev/null || true; done
  wait
  rm -rf "$sessions"
}
trap finish EXIT

# Until a command succeeds, for so many seconds.
await() {
  for ((waited = 0; waited < $1; waited++)); do
    if "${@:2}" >/dev/null 2>&1; then return 0; fi
    sleep 1
  done
  return 1
}

# What docs/serving.md asks of every node.
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=evolve_ray.serve.guard:middlewares RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0
export RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60 RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S=30
EVOLVE_RAY_KEYS=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export EVOLVE_RAY_KEYS

# Name of the log, then the options of `ray start`. Each node has a folder of its own for its session, as on machines of their own:
# in a shared one a node that leaves deletes the working directory of the job that runs on the other.
sessions=$(mktemp -d) # short: the names of sockets have 107 characters
node() {
  ray start "${@:2}" --temp-dir="$sessions/$1" --block --num-cpus=2 --object-store-memory=200000000 --disable-usage-stats >"$place/$1.log" 2>&1 &
  pids+=($!)
}
node head --head --node-ip-address=127.0.0.1 --port=$gcs --dashboard-host=127.0.0.1 --dashboard-port=$dashboard \
  --dashboard-agent-listen-port=9582 --ray-client-server-port=9583
await 60 ray job list --address "$address" || fail "the head did not start, see $place/head.log"
if RAY_AUTH_MODE=disabled curl -sf "$address/api/jobs/" >/dev/null; then fail "the job API answers without a token"; fi
node worker --address=127.0.0.1:$gcs --dashboard-agent-listen-port=9584
worker=${pids[1]}
if command -v prometheus >/dev/null; then # with the configuration that Ray wrote for it
  prometheus --config.file="$sessions"/head/session_latest/metrics/prometheus/prometheus.yml --storage.tsdb.path="$place/prometheus" \
    --web.listen-address=127.0.0.1:$scraper >"$place/prometheus.log" 2>&1 &
  pids+=($!)
fi
both() { [ "$(ray list nodes --address "$address" --filter state=ALIVE --format json | grep -o '"node_id"' | wc -l)" = 2 ]; }
await 30 both || fail "the second node did not join, see $place/worker.log"
git clone --quiet . "$place/clone"
echo "two nodes are alive; submitting"

small=(toy.base_steps=40 toy.num_train=300 toy.num_heldout=24 toy.num_out_of_domain=8 toy.num_triples=192
  prompts.per_iteration=64 engine.shard_prompts=8 trainer.checkpoint_steps=2
  engine.cpus_per_actor=0.8 engine.release_for_training=true) # one engine a node, and both fit on the one that is left
submit() {
  ray job submit --address "$address" --submission-id "$1" --metadata-json '{"job_name": "evolve-ray smoke"}' --working-dir "$place/clone" -- \
    python jobs/iterate.py jobs/recipes/tiny.toml --run "$place/run" --iterations 1 "${small[@]}"
}
submit smoke >"$place/job.log" 2>&1 &
job=$!
generating() { grep -q '"event": "shard", "stage": "generations"' "$place/run/events.jsonl" 2>/dev/null; }
await 600 generating || fail "no shard was generated, see $place/job.log"
python jobs/status.py "$place/run"
doomed=$(family "$worker")
engines=0
for pid in $doomed; do if grep -q VLLM_ENABLE_V1 "/proc/$pid/environ" 2>/dev/null; then engines=$((engines + 1)); fi; done
xargs kill -KILL <<<"$doomed"
[ "$engines" -gt 0 ] || fail "no engine was on the second node"
echo "killed the second node while drafts were generated; processes of engines on it: $engines"
node replacement --address=127.0.0.1:$gcs --dashboard-agent-listen-port=9585
await 60 both || fail "the new node did not join, see $place/replacement.log"
echo "another node is there"
wait "$job" || fail "the job failed, see $place/job.log"
ray job status --address "$address" smoke | grep -q -i succeeded || fail "Ray does not call the job succeeded"
[ "$(python jobs/status.py "$place/run" --json | python -c 'import json, sys; print(json.load(sys.stdin)["state"])')" = finished ] ||
  fail "the run is not finished: python jobs/status.py $place/run"
if command -v prometheus >/dev/null; then
  python cluster/panels.py http://127.0.0.1:$scraper --picture "$place/panels.png" || fail "a panel of the dashboard is empty"
fi

sed -e "s#/shared/runs/NAME.*#$place/run#" -e "s#port: .*#port: $endpoint#" -e "s#serve.max_replicas=8#serve.max_replicas=0#" \
  cluster/serve.yaml >"$place/serve.yaml"
serve deploy --address "$address" "$place/serve.yaml" >"$place/serve.log" 2>&1 || fail "serve deploy failed, see $place/serve.log"
ask() { # Key, then the body.
  curl -s -o "$place/reply.json" -w '%{http_code}' -H "Authorization: Bearer $1" -H 'Content-Type: application/json' \
    -d "$2" "http://127.0.0.1:$endpoint/v1/chat/completions"
}
body='{"messages": [{"role": "user", "content": "sort:hbca"}], "seed": 7, "refine": {"rounds": 2}}'
answered() { [ "$(ask "$EVOLVE_RAY_KEYS" "$body")" = 200 ]; }
await 180 answered || fail "no refined answer: $(cat "$place/reply.json")"
grep -q '"rounds"' "$place/reply.json" || fail "the reply has no rounds: $(cat "$place/reply.json")"
[ "$(ask wrong "$body")" = 401 ] || fail "the endpoint answers without a key"
replica_nodes() {
  ray list actors --address "$address" --filter state=ALIVE --format json --limit 1000 |
    python -c 'import json, sys; print(len({actor["node_id"] for actor in json.load(sys.stdin) if "replica" in (actor["name"] or "").lower() and "scorer" not in actor["name"]}))'
}
two_replicas() { [ "$(replica_nodes)" = 2 ]; }
await 60 two_replicas || fail "the replicas are on $(replica_nodes) nodes, not on two"
echo "serve deploy: two nodes serve the run with keys"
serve shutdown --address "$address" --yes >>"$place/serve.log" 2>&1

finish
pids=()
python jobs/verify.py "$place/run"
unset RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH
echo "the same run on this machine alone, undisturbed"
python jobs/iterate.py jobs/recipes/tiny.toml --run "$place/twin" --iterations 1 "${small[@]}" >"$place/twin.log" 2>&1 ||
  fail "the undisturbed run failed, see $place/twin.log"
cmp "$place/run/iteration-01/pairs/pairs.parquet" "$place/twin/iteration-01/pairs/pairs.parquet" || fail "the pairs differ"
echo "cluster-smoke: passed; the pairs of both runs are byte-identical"
