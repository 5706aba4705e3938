#!/bin/busybox sh
# Gives the cards and a veth what the agent wants of an interface, and asks it which mode each one gets.
ip link add type veth
number=0
interfaces=
for path in /sys/class/net/eth* /sys/class/net/veth*; do
    name=${path##*/}
    number=$((number + 1))
    ip address add "198.18.$number.1/24" dev "$name"
    ip link set "$name" up
    interfaces="$interfaces --iface $name"
done
# The words are a list.
# shellcheck disable=SC2086
exec /xdp-agent doctor --try $interfaces
