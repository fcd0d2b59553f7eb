package link

import "golang.org/x/sys/unix"

// Traffic control's numbers that x/sys/unix lacks.
const (
	clsact        = 0xfffffff1 // TC_H_CLSACT, and TC_H_INGRESS
	clsactHandle  = 0xffff0000
	clsactIngress = 0xfffffff2
	clsactEgress  = 0xfffffff3
	tcaBPFFd      = 6
	tcaBPFName    = 7
	tcaBPFFlags   = 8
	directAction  = 1
	// filterPriority is behind all that an administrator would put there.
	filterPriority = 0xfe00
	sizeofTcmsg    = 20
	filterHandle   = 1
)

// AddFilter has the BPF program see the frames that come in by the interface
// with the index, or, with egress, those that the host sends there. It takes the
// place of one that was there. It is gone with the interface.
func (b *Batch) AddFilter(index int, egress bool, prog int) {
	kind, parent := "ingress", uint32(clsactIngress)
	if egress {
		kind, parent = "clsact", clsactEgress
	}
	b.begin("make room for filters", unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_EXCL, tcmsg(index, clsactHandle, clsact, 0))
	b.attrString(unix.TCA_KIND, kind)
	b.allow(unix.EEXIST)

	b.begin("add a filter", unix.RTM_NEWTFILTER, unix.NLM_F_CREATE, tcmsg(index, filterHandle, parent, filterPriority<<16|everything()))
	b.attrString(unix.TCA_KIND, "bpf")
	b.open(unix.TCA_OPTIONS)
	b.attr32(tcaBPFFd, uint32(prog))
	b.attrString(tcaBPFName, "tenon")
	b.attr32(tcaBPFFlags, directAction)
	b.close()
}

// DelFilter takes away what AddFilter put there.
func (b *Batch) DelFilter(index int, egress bool) {
	parent := uint32(clsactIngress)
	if egress {
		parent = clsactEgress
	}
	b.begin("delete a filter", unix.RTM_DELTFILTER, 0, tcmsg(index, filterHandle, parent, filterPriority<<16|everything()))
	b.attrString(unix.TCA_KIND, "bpf")
}

// everything is ETH_P_ALL as the network writes it.
func everything() uint32 { return uint32(native.Uint16([]byte{0, unix.ETH_P_ALL})) }

func tcmsg(index int, handle, parent, info uint32) []byte {
	hdr := make([]byte, sizeofTcmsg)
	native.PutUint32(hdr[4:], uint32(index))
	native.PutUint32(hdr[8:], handle)
	native.PutUint32(hdr[12:], parent)
	native.PutUint32(hdr[16:], info)
	return hdr
}
