#!/bin/sh
# Makes a disk image with an operating system, small and quick to boot: BIOS, syslinux,
# Debian's kernel for clouds, busybox. It takes its address by DHCP, its name from the
# seed disk, answers on port 80, has a shell on the serial console, and turns itself off
# when its power button is pressed.
#
#	systemdisk.sh KERNEL-DIR OUT.raw
#
# KERNEL-DIR is an unpacked linux-image package. Needs syslinux, syslinux-common, mtools, dosfstools,
# busybox-static and cpio.
set -eu
kernel=$1 out=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root/bin" "$root/proc" "$root/sys" "$root/dev" "$root/run" "$root/tmp" "$root/etc/acpi/PWRF" "$root/mnt" "$root/m" "$root/www" "$root/disk"
cp "$(command -v busybox)" "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
modules="virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci failover net_failover virtio_net virtio_blk evdev button cdrom isofs"
for m in $modules; do
	cp "$(find "$kernel" -name "$m.ko" | head -n 1)" "$root/m/"
done
cat >"$root/init" <<EOF
#!/bin/sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for m in $modules; do insmod /m/\$m.ko; done
EOF
cat >>"$root/init" <<'EOF'
ip link set lo up
acpid -d >/tmp/acpid.log 2>&1 &
mount -t iso9660 -o ro /dev/disk/by-label/cidata /mnt 2>/dev/null || for d in /dev/vdb /dev/vda; do
	mount -t iso9660 -o ro $d /mnt 2>/dev/null && break
done
echo "seed: $(cat /mnt/meta-data | tr '\n' ' ')"
for i in /sys/class/net/eth*; do
	i=${i##*/}
	ip link set $i up
	udhcpc -i $i -s /dhcp -t 30 -T 1 -n -q >/tmp/udhcpc.log 2>&1 || echo "no address on $i"
	cat /tmp/dhcp.$i
done
# Boots are counted on the disk, where nothing else is.
n=$(dd if=/dev/vda bs=512 skip=1 count=1 2>/dev/null | tr -dc 0-9)
n=$((${n:-0} + 1))
printf '%-512s' $n | dd of=/dev/vda bs=512 seek=1 count=1 conv=fsync 2>/dev/null
echo "$(hostname) boot $n" >/www/index.html
cp /mnt/user-data /www/user-data
httpd -h /www
echo "system is up: boot $n, $(($(cat /sys/class/block/vda/size) / 2048)) MiB, $(nproc) processors"
exec setsid cttyhack sh
EOF
cat >"$root/dhcp" <<'EOF'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
[ -n "$router" ] && ip route add default via $router
for d in $dns; do echo nameserver $d; done >/etc/resolv.conf
[ -n "$hostname" ] && hostname $hostname
echo "$interface has $ip/$mask, router $router, dns $dns, name $hostname" >/tmp/dhcp.$interface
EOF
cat >"$root/etc/acpi/PWRF/00000080" <<'EOF'
#!/bin/sh
echo "the power button was pressed" >/dev/console
poweroff -f
EOF
chmod 755 "$root/init" "$root/dhcp" "$root/etc/acpi/PWRF/00000080"
(cd "$root" && find . | sort | cpio -o -H newc -R 0:0 --quiet | gzip -1 >"$work/initrd.gz")
cat >"$work/syslinux.cfg" <<EOF
DEFAULT linux
PROMPT 0
TIMEOUT 0
LABEL linux
 KERNEL vmlinuz
 APPEND console=ttyS0 quiet mitigations=off initrd=initrd.gz
EOF
disk=$work/disk.raw
mib=48
truncate -s ${mib}M "$disk"
dd if=/usr/lib/syslinux/mbr/mbr.bin of="$disk" conv=notrunc status=none
# One partition, of FAT, that boots, from 1 MiB to the end: 2048 and 96256 sectors.
printf '\200\040\041\000\014\376\377\377\000\010\000\000\000\170\001\000' | dd of="$disk" bs=1 seek=446 conv=notrunc status=none
printf '\125\252' | dd of="$disk" bs=1 seek=510 conv=notrunc status=none
mkfs.vfat --offset 2048 -h 2048 "$disk" $(((mib - 1) * 1024)) >/dev/null
mcopy -i "$disk@@1M" "$kernel"/boot/vmlinuz-* ::vmlinuz
mcopy -i "$disk@@1M" "$work/initrd.gz" "$work/syslinux.cfg" ::
syslinux --install --offset $((2048 * 512)) "$disk"
mv "$disk" "$out"
