"""A write-back cache daemon that serves virtio-blk disks over vhost-user."""
