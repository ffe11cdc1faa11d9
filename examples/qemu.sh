#!/bin/sh
# A QEMU guest with a disk that vhostcache serves. Start the daemon first:
#
#   vhostcache create disk.img --size 20GiB
#   vhostcache export disk.img --socket /run/vhostcache/vda.sock
#   examples/qemu.sh /run/vhostcache/vda.sock -cdrom installer.iso
#
# usage: qemu.sh SOCKET [QEMU OPTION...]       environment: MEMORY (1G), PROCESSORS (2), ACCELERATORS (kvm:tcg)
set -eu

socket=${1:?usage: qemu.sh SOCKET [QEMU OPTION...]}
shift
memory=${MEMORY:-1G}
processors=${PROCESSORS:-2}

# - The guest's memory has to be shared with the daemon: a memfd with share=on.
# - reconnect=1: when the daemon is restarted, the guest's I/O waits and goes on.
# - As many queues as processors: each has its own then.
# - bootindex=1: boot from the disk, unless an option says otherwise.
exec qemu-system-x86_64 \
    -machine "q35,accel=${ACCELERATORS:-kvm:tcg},memory-backend=memory" -cpu max -smp "$processors" -m "$memory" \
    -object "memory-backend-memfd,id=memory,size=$memory,share=on" \
    -chardev "socket,id=vda,path=$socket,reconnect=1" \
    -device "vhost-user-blk-pci,chardev=vda,num-queues=$processors,bootindex=1" \
    "$@"
