#!/bin/bash
# Makes $TENON_CACHE/ninep: vmlinuz and initrd of a guest whose files come by virtio-9p,
# which bench/ compares with Tenon's (the kernel for clouds has no 9p, so it is
# Debian's general one). The guest mounts the share "files", runs its bench.sh, and goes.
# Nothing of it is installed on the system. Half a minute; kept until the recipe changes.
. "$(dirname "$0")/lib.sh"
version="1 $(. /etc/os-release && echo "${VERSION_CODENAME:-trixie}")"
ready ninep "$version" && exit 0
need cpio cpio
need depmod kmod
need busybox busybox-static
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
package=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1)
[ -n "$package" ] || { echo "ninep: apt knows no linux-image-amd64 (apt-get update)" >&2; exit 1; }
(cd "$work" && apt-get download -q "$package" >/dev/null 2>&1 && dpkg-deb -x "$package"_*.deb kernel) ||
	{ echo "ninep: could not fetch $package" >&2; exit 1; }
release=${package#linux-image-}
depmod -b "$work/kernel" "$release"
mkdir -p "$work/initrd/bin" "$work/initrd/modules" "$work/initrd/dev" "$work/initrd/proc" "$work/initrd/sys" "$work/initrd/m"
cp "$(command -v busybox)" "$work/initrd/bin/busybox"
n=100
for m in virtio_pci 9pnet_virtio 9p; do
	modprobe -d "$work/kernel" -S "$release" --show-depends "$m" | sed -n 's/^insmod \([^ ]*\).*/\1/p' | while read -r file; do
		[ -e "$work/seen.${file##*/}" ] && continue
		touch "$work/seen.${file##*/}"
		cp "$file" "$work/initrd/modules/$n-${file##*/}"
		n=$((n + 1))
	done
	n=$((n + 100))
done
cat >"$work/initrd/init" <<'INIT'
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t devtmpfs none /dev
for m in /modules/*; do insmod $m; done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose files /m || echo "9p: no mount"
mkdir -p /v /m/proc
if [ -x /m/bin/busybox ]; then
	mount -t proc none /m/proc
	chroot /m sh -e /bench.sh
else
	mount --bind /m /v
	sh -e /v/bench.sh
fi
echo "9p: ended with $?"
sync
poweroff -f
INIT
chmod 755 "$work/initrd/init"
mkdir -p "$TENON_CACHE/ninep"
(cd "$work/initrd" && find . | cpio -o -H newc --quiet | gzip -1) >"$TENON_CACHE/ninep/initrd"
cp "$work/kernel/boot/vmlinuz-$release" "$TENON_CACHE/ninep/vmlinuz"
mark ninep "$version"
