#!/bin/bash
# A Slurm cluster of a login node ("head") and two compute nodes on one machine, of namespaces alone: cluster.sh login STATE
#   head          network with the bridge, munged, slurmctld; the caller waits for STATE/ready
#   node1, node2  each with its own address, name, processes, /tmp, /dev/shm and /run, with slurmd and sshd
# STATE is /srv inside, and so the folder that all nodes share. Nothing of the machine's own network, /etc or /run is touched. When
# the process that started this is killed, the kernel ends every process in here, and with them go the mounts and the network.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
CHECKOUT=$(cd "$(dirname "$0")/../.." && pwd)
NODES="node1 node2"

login() {
    mount --bind "$1" /srv # what lies under /tmp is hidden on a node; this is not
    hostname head
    mount -t tmpfs -o mode=755 tmpfs /run
    mkdir -p /run/munge /run/netns /run/sshd /srv/{log,state,ssh,slurm,shared}
    mkdir -p /etc/slurm /etc/ssh
    network
    command head -c 128 /dev/urandom >/srv/munge.key && chmod 400 /srv/munge.key
    munged --key-file=/srv/munge.key --seed-file=/srv/state/munge --log-file=/srv/log/munged.log --pid-file=/run/munge/munged.pid
    for card in 0 1 2 3; do mknod /srv/state/a10-$card c 1 3; done # Slurm wants character devices: each is a /dev/null
    gres_conf >/srv/slurm/gres.conf && slurm_conf >/srv/slurm/slurm.conf && mount --bind /srv/slurm /etc/slurm
    ssh_conf
    slurmctld
    for node in $NODES; do switch_on $node; done
    until [ "$(sinfo --noheader --Node --states=idle --partition=gpu | wc -l)" = 2 ]; do sleep 0.05; done
    touch /srv/ready
    stay
}

switch_on() { # also after a crash, which is the end of its first process
    ip link set v"$1" up
    nsenter --net=/run/netns/"$1" setsid unshare --mount --uts --ipc --pid --fork --kill-child=KILL --mount-proc \
        bash "$0" node "$1" </dev/null >/srv/log/"$1".out 2>&1 &
}

node() {
    hostname "$1"
    mkdir -p /srv/state/run-"$1"
    mount -t tmpfs -o mode=755 tmpfs /srv/state/run-"$1"
    mkdir -p /srv/state/run-"$1"/{munge,sshd,checkout}
    mount --bind /run/munge /srv/state/run-"$1"/munge
    mount --bind "$CHECKOUT" /srv/state/run-"$1"/checkout
    mount --rbind /srv/state/run-"$1" /run
    mount -t tmpfs -o mode=1777 tmpfs /tmp
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    [ -d "$CHECKOUT" ] || { mkdir -p "$CHECKOUT" && mount --bind /run/checkout "$CHECKOUT"; } # it lies in /tmp: on a cluster, it would not
    $(command -v sshd)
    slurmd -N "$1"
    stay
}

stay() { # the first process of a pid namespace: bash buries the orphans
    while :; do sleep 3600 & wait $! || true; done
}

network() {
    ip link set lo up
    ip link add br0 type bridge && ip addr add 10.77.0.1/24 dev br0 && ip link set br0 up
    printf '%s\n' "127.0.0.1 localhost" "10.77.0.1 head" "10.77.0.11 node1" "10.77.0.12 node2" >/srv/hosts
    mount --bind /srv/hosts /etc/hosts
    : >/srv/resolv.conf && mount --bind /srv/resolv.conf "$(readlink -f /etc/resolv.conf)" || true
    for node in $NODES; do
        ip netns add $node
        ip link add v$node type veth peer name eth0 netns $node
        ip link set v$node master br0 up
        ip -n $node link set lo up && ip -n $node link set eth0 up
        ip -n $node addr add 10.77.0.1${node#node}/24 dev eth0
    done
}

slurm_conf() {
    # cred_expire: how long a requeued job waits at least; 5 is the least that Slurm takes (default 120 s).
    # SlurmdTimeout: longer than the launcher needs to find a node gone, as on real clusters (default 300 s).
    # config_overrides: nodes may claim more cores than this machine has.
    # Partition low gives way to high: GraceTime 60 s after a warning, which goes to the batch script as --signal says.
    cat <<CONF
ClusterName=tests
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge/munge.socket.2,cred_expire=5
StateSaveLocation=/srv/state/ctld
SlurmdSpoolDir=/srv/state/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/srv/log/slurmctld.log
SlurmdLogFile=/srv/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout=60
KillWait=5
MinJobAge=3600
DefMemPerCPU=100
GresTypes=gpu
NodeName=node[1-2] CPUs=8 RealMemory=8000 Gres=gpu:a10:4 State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF
PartitionName=short Nodes=node1 MaxTime=30 PriorityTier=10 PreemptMode=OFF
CONF
}

gres_conf() { # four cards a node, which no program finds
    printf '%s\n' AutoDetect=off "NodeName=node[1-2] Name=gpu Type=a10 File=/srv/state/a10-[0-3]"
}

ssh_conf() {
    ssh-keygen -q -t ed25519 -N '' -f /srv/state/host_key
    ssh-keygen -q -t ed25519 -N '' -f /srv/state/user_key
    echo "* $(cut -d' ' -f1,2 /srv/state/host_key.pub)" >/srv/ssh/ssh_known_hosts
    printf '%s\n' "Host *" "  IdentityFile /srv/state/user_key" "  BatchMode yes" >/srv/ssh/ssh_config
    printf '%s\n' "HostKey /srv/state/host_key" "AuthorizedKeysFile /srv/state/user_key.pub" "PidFile none" "StrictModes no" "UseDNS no" \
        "UsePAM no" "PasswordAuthentication no" "MaxStartups 100:30:200" >/srv/ssh/sshd_config
    mount --bind /srv/ssh /etc/ssh
}

"$@"
