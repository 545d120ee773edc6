#!/bin/bash -e
# A step of pi-gen that puts the model "@NAME@" into an image: copy this whole folder to
# stage-@NAME@/00-install/files/@NAME@ and this file to stage-@NAME@/00-install/00-run.sh.
#
# What depends on the processor, the packages and the compiled kernels, is installed by the service
# @NAME@-install at the first start of the Pi, which needs the network then.
install -d "${ROOTFS_DIR}/opt/@NAME@"
cp -R files/@NAME@ "${ROOTFS_DIR}/opt/@NAME@/upload"
cat > "${ROOTFS_DIR}/etc/systemd/system/@NAME@-install.service" << 'END'
[Unit]
Description=Installation of the language model @NAME@
ConditionPathExists=!/opt/@NAME@/package
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
ExecStart=/opt/@NAME@/upload/install.sh
TimeoutStartSec=3600

[Install]
WantedBy=multi-user.target
END
on_chroot << 'END'
apt-get install -y python3-venv
systemctl enable @NAME@-install.service
END
