package container

import (
	"math/rand/v2"
	"strconv"
	"strings"
)

// The words of generated names: a quality and a thing of the workshop.
var (
	qualities = strings.Fields(`able amber apt ash bold brave brisk bright broad calm candid clean
clear clever cosy crisp deft eager early easy even fair fine firm fleet fond frank free fresh gentle
glad golden good grand green handy happy hardy hearty honest humble jolly just keen kind light lively
loyal lucky mellow merry mild neat nimble noble patient plain polite proud quick quiet rapid ready
robust round sage sharp silver sincere smart smooth snug solid sound spry stable steady still stout
strong sturdy sunny sure sweet swift tidy tough true trusty upright vivid warm wise witty young`)
	things = strings.Fields(`adze alder anvil apron ash auger awl balsa barrel basket beam beech bench
bevel birch block board bolt bracket broom brush buckle burin cabin caliper cedar chest chisel clamp
compass cooper cord crane croze dowel drawer easel elm fir flax forge frame froe gauge gimlet glue
hammer handle hasp hazel hinge hook inlay jig joint joist kiln lantern larch lathe latch ledge level
linden loom maple mallet marquetry mason mill mitre mortise nail oak pail pine plane plank plumb poplar
pulley quill rafter rasp rivet roof router rowan rule saddle sander saw scribe shaving shelf shovel
spindle spruce square stool table teak timber tongs trowel vise walnut wedge wheel willow yew`)
)

// RandomName makes a name like "keen_mallet" that taken does not know.
func RandomName(taken func(string) bool) string {
	for try := 0; ; try++ {
		name := qualities[rand.IntN(len(qualities))] + "_" + things[rand.IntN(len(things))]
		if try > 4 {
			name += strconv.Itoa(rand.IntN(10 << min(try, 20)))
		}
		if !taken(name) {
			return name
		}
	}
}
