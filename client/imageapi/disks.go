package imageapi

// Labels that each disk image shows, whatever its config has under these names: what
// clients print, and filters by label find. The value of LabelKind is KindDisk.
const (
	LabelKind            = "dev.tenon.kind"
	LabelDiskFormat      = "dev.tenon.disk.format"
	LabelDiskVirtualSize = "dev.tenon.disk.virtual-size" // bytes
	LabelDiskFirmware    = "dev.tenon.disk.firmware"
	LabelDiskUser        = "dev.tenon.disk.user"

	KindDisk = "disk"
)
