#!/bin/bash
# Several Ray nodes on this machine, for development: cluster/local.sh up [NODES] | env | down
#   cluster/local.sh up 3 && eval "$(cluster/local.sh env)" && python jobs/submit.py --id try -- jobs/run.py --config demo \
#     --set execution.max_actors=3 --out /tmp/try
# Stops only what it has started.
set -euo pipefail
DIR=${ISIC_LOCAL_DIR:-/tmp/isic-local} PORT=${ISIC_LOCAL_PORT:-6479} JOBS=${ISIC_LOCAL_JOBS:-8365}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$DIR/token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1

case ${1:-} in
up)
  nodes=${2:-2}
  [ ! -e "$DIR/pids" ] || { echo "already up; cluster/local.sh down first" >&2; exit 1; }
  mkdir -p "$DIR"
  (umask 077; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$DIR/token")
  ray start --head --block --port="$PORT" --num-cpus=1 --dashboard-host=127.0.0.1 --dashboard-port="$JOBS" \
    --temp-dir="$DIR/ray" --disable-usage-stats > "$DIR/head.log" 2>&1 &
  echo $! > "$DIR/pids"
  for _ in $(seq 120); do grep -q "Ray runtime started" "$DIR/head.log" && break; sleep 0.5; done
  for number in $(seq 2 "$nodes"); do
    ray start --block --address="127.0.0.1:$PORT" --num-cpus=1 --disable-usage-stats > "$DIR/node$number.log" 2>&1 &
    echo $! >> "$DIR/pids"
  done
  echo "$nodes nodes, job server http://127.0.0.1:$JOBS; eval \"\$($0 env)\" to use it"
  ;;
env) printf 'export RAY_ADDRESS=http://127.0.0.1:%s RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=%s\n' "$JOBS" "$DIR/token" ;;
down)
  tac "$DIR/pids" | while read -r pid; do kill "$pid" 2>/dev/null || true; done
  rm -f "$DIR/pids" "$DIR/token"
  ;;
*) sed -n '2,5s/^# //p' "$0" >&2; exit 2 ;;
esac
