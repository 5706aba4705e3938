#!/bin/busybox sh
# The first and only process of a guest: mounts what the lanes need, loads the modules, runs each lane of /run.list, and
# ends the machine. What the other side reads are the lines that begin with "##vm".
export PATH=/bin HOME=/tmp
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /tmp /run /etc
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /dev/net
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up
while read -r module; do
    insmod "$module" || echo "##vm broken cannot load $module"
done < /modules
echo "##vm kernel $(uname -r)"
while read -r lane command; do
    echo "##vm begin $lane"
    sh -c "$command"
    echo "##vm end $lane $?"
done < /run.list
echo "##vm over"
# With -no-reboot this ends the machine on every architecture.
reboot -f
