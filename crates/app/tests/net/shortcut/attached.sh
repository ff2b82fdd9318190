# attached.sh UNDERPASS CGROUP EXCHANGE: the shortcut as its users have it. Mounts and
# addresses are of this script's own namespaces.
underpass=$1 cgroup=$2 exchange=$3
mount --make-rprivate /
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
fail() { echo "$*" >&2; exit 1; }
folder=$(mktemp -d)
trap '"$underpass" shortcut detach >/dev/null 2>&1 || true; rm -r "$folder"' EXIT

# Starts both ends; the outputs are compared by `join`.
start() {
    sh -c 'echo $$ > "$0/cgroup.procs"; exec python3 "$@"' "$cgroup" "$exchange" server 127.0.0.1 0 "$1" 20000 1 >"$folder/server" & server=$!
    until [ -s "$folder/server" ]; do sleep 0.05; done
    sh -c 'echo $$ > "$0/cgroup.procs"; exec python3 "$@"' "$cgroup" "$exchange" client 127.0.0.1 "$(head -1 "$folder/server")" "$1" 20000 1 >"$folder/client" & client=$!
}
join() {
    wait "$server" && wait "$client" || fail "an end ended badly"
    sent=$(cut -d' ' -f1 "$folder/client") received=$(tail -1 "$folder/server" | cut -d' ' -f2)
    [ "$sent" = "$received" ] || fail "other bytes arrived"
    rm "$folder/server" "$folder/client"
}
figure() { "$underpass" shortcut show --json | python3 -c "import json, sys; print(json.load(sys.stdin)['$1'])"; }

# Nothing stays attached to the control group, which is this test's alone. The kernel takes
# what is unlinked off in its own time.
left_alone() {
    tries=0
    while [ -n "$(bpftool cgroup show "$cgroup")" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] || fail "programs are left behind: $(bpftool cgroup show "$cgroup")"
        sleep 0.1
    done
    [ ! -e /sys/fs/bpf/underpass ] || fail "pins are left behind"
}

until_accelerated() {
    until [ "$(figure accelerated_now)" = 1 ]; do
        kill -0 "$client" 2>/dev/null || fail "the connection ended and was never seen accelerated"
    done
}

"$underpass" shortcut show | grep 'not attached' >/dev/null || fail "it is attached before"
"$underpass" shortcut attach --cgroup /no/such 2>/dev/null && fail "it takes a control group that is none"
"$underpass" shortcut attach --cgroup "$cgroup" | tee "$folder/out"
[ -n "$(bpftool cgroup show "$cgroup")" ] || fail "no program is attached to the control group"
[ "$(wc -l <"$folder/out")" -eq 2 ] || fail "attach does not say it in two lines"
"$underpass" status | grep '^shortcut.*helper process' >/dev/null || fail "status does not show it"

start 3000; join
[ "$(figure accelerated)" = 1 ] || fail "the connection was not accelerated"
"$underpass" shortcut show --metrics | grep '^underpass_shortcut_redirected_bytes_total{' >/dev/null || fail "no metrics"

# The helper dies in the middle of a connection.
start 8000
until_accelerated
kill -9 "$(figure helper)"
join
"$underpass" status | grep 'not at work' >/dev/null || fail "status does not say that the helper died"
start 100; join
[ "$(figure accelerated)" = 2 ] || fail "something was accelerated without a helper"
"$underpass" shortcut detach
left_alone

# Detached in the middle of a connection.
"$underpass" shortcut attach --cgroup "$cgroup" --port 1 65535 >/dev/null
"$underpass" down
"$underpass" shortcut attach --cgroup "$cgroup" >/dev/null
start 8000
until_accelerated
helper=$(figure helper)
"$underpass" shortcut detach
[ ! -e /sys/fs/bpf/underpass ] || fail "pins are left behind"
join
left_alone
# A zombie that nobody has waited for has ended, too.
! [ -e "/proc/$helper" ] || grep '^State:.*zombie' "/proc/$helper/status" >/dev/null || fail "the helper goes on"

# What a risk is accepted for is accelerated, too: programs that wait in recv.
"$underpass" shortcut attach --cgroup "$cgroup" --accept-risk nonsense 2>/dev/null && fail "it takes a risk that is none"
"$underpass" shortcut attach --cgroup "$cgroup" >/dev/null
blocking() {
    sh -c 'echo $$ > "$0/cgroup.procs"; exec python3 "$@"' "$cgroup" "$(dirname "$exchange")/blocking.py" 127.0.0.1 200 |
        grep '^True' >/dev/null || fail "other bytes arrived"
}
blocking
[ "$(figure accelerated)" = 0 ] || fail "a program that waits in recv was accelerated"
"$underpass" shortcut detach
"$underpass" shortcut attach --cgroup "$cgroup" --accept-risk blocking-recv >/dev/null
blocking
[ "$(figure accelerated)" = 1 ] || fail "a program was not accelerated though the risk is accepted"
"$underpass" shortcut detach
left_alone
echo "all is well"
