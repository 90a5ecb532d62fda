#!/bin/bash
# A real S3 server for tests/runs/test_s3.py: one monitor, one in-memory OSD and the RADOS gateway on loopback.
# Needs the packages ceph-mon ceph-osd ceph-common radosgw. Stop: kill $(cat DIR/run/*.pid.sh). Not for production.
# usage: ceph_rgw.sh DIR PORT [MON_PORT]; all data under DIR, which is removed first
set -euo pipefail
D=${1:?dir}; PORT=${2:-7480}; MP=${3:-16789}; ACCESS=${S3_ACCESS:-testkey}; SECRET=${S3_SECRET:-testsecret}
rm -rf "$D"; mkdir -p "$D"/{mon,osd,log,run}
FSID=$(cat /proc/sys/kernel/random/uuid)
cat > "$D/ceph.conf" <<C
[global]
fsid = $FSID
mon host = [v2:127.0.0.1:$MP]
auth cluster required = none
auth service required = none
auth client required = none
run dir = $D/run
admin socket = $D/run/\$cluster-\$name.asok
log file = $D/log/\$name.log
pid file = $D/run/\$name.pid
crash dir = $D/crash
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon allow pool delete = true
mon max pg per osd = 1000
mon data avail crit = 1
mon data avail warn = 1
public network = 127.0.0.0/8
public addr = 127.0.0.1
paxos propose interval = 0.05
paxos min wait = 0.02
mon tick interval = 1
osd heartbeat interval = 2
osd op num shards = 2
ms bind ipv4 = true
[mon.a]
mon data = $D/mon
host = $(hostname -s)
[osd.0]
osd data = $D/osd
osd objectstore = memstore
memstore device bytes = 2147483648
osd memory target = 939524096
host = $(hostname -s)
[client.admin]
ms mon client mode = crc secure
rgw frontends = beast endpoint=127.0.0.1:$PORT tcp_nodelay=1
rgw dns name =
rgw enable usage log = false
rgw run sync thread = false
rgw enable quota threads = false
rgw enable lc threads = false
rgw enable gc threads = false
rgw thread pool size = 32
C
export CEPH_CONF=$D/ceph.conf
c() { ceph -c "$CEPH_CONF" "$@"; }
t0=$(date +%s.%N); el() { echo "$(echo "$(date +%s.%N)-$t0" | bc 2>/dev/null || python3 -c "import time;print(round(time.time()-$t0,2))")s $*"; }
ceph-authtool -C "$D/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
ceph-authtool "$D/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' >/dev/null
monmaptool --create --fsid $FSID --addv a "[v2:127.0.0.1:$MP]" "$D/monmap" >/dev/null
ceph-mon -c $CEPH_CONF -i a --mkfs --monmap "$D/monmap" --keyring "$D/keyring" >/dev/null 2>"$D/log/mkfs.err"
ceph-mon -c $CEPH_CONF -i a -f >"$D/log/mon.out" 2>&1 & echo $! > "$D/run/mon.pid.sh"
U=$(cat /proc/sys/kernel/random/uuid)
c osd new $U >/dev/null; el mon up, osd id allocated
ceph-osd -c $CEPH_CONF -i 0 --mkfs --osd-uuid $U >"$D/log/osdmkfs.out" 2>&1
ceph-osd -c $CEPH_CONF -i 0 -f >"$D/log/osd.out" 2>&1 & echo $! > "$D/run/osd.pid.sh"
for i in $(seq 100); do c osd stat 2>/dev/null | grep -q "1 up" && break; sleep 0.2; done; el osd up
# user goes in before rgw starts (creates pools)
radosgw-admin -c $CEPH_CONF user create --uid=test --display-name=test --access-key="$ACCESS" --secret-key="$SECRET" >"$D/log/user.out" 2>&1; el user created
radosgw -c $CEPH_CONF -n client.admin -f >"$D/log/rgw.out" 2>&1 & echo $! > "$D/run/rgw.pid.sh"
for i in $(seq 200); do curl -s -o /dev/null "http://127.0.0.1:$PORT/" && ok=1 && break; sleep 0.1; done; [ "${ok:-}" ] || { tail -3 $D/log/client*.log; exit 1; }; el rgw answers on $PORT
