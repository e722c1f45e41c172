// SPDX-License-Identifier: Apache-2.0

package plan

import "math/bits"

// The first 64 bits of the fractional parts of the square roots of the first six primes (FIPS 180-4 lists them as the start values
// of SHA-512): numbers without a pattern that nobody picked. The places of one product never share one, nor do places whose values
// meet, since equal ones would cancel to a factor of zero. The one that multiplies tensors is odd, so it keeps them apart.
const (
	root2  = 0x6A09E667F3BCC908
	root3  = 0xBB67AE8584CAA73B
	root5  = 0x3C6EF372FE94F82B
	root7  = 0xA54FF53A5F1D36F1
	root11 = 0x510E527FADE682D1
	root13 = 0x9B05688C2B3E6C1F
)

// Hash condenses a plan to 64 bits: the block ids of the request and the ordered segments, all fields of each. Both ends of a link
// compute it and compare, so that two ends which understood a request differently move nothing. It depends on values only, not on
// the machine. It is no defence against a peer that lies: that is what the bounds of [Build] are for.
//
// With fold(a, b) = the high XOR the low word of the 128-bit product a*b, the mixing step of wyhash (Wang Yi, public domain), of
// which only one a segment lies on the chain from one to the next, and all other arithmetic in 64 bits:
//
//	h = fold(number of segments ^ root2, (number of source blocks rotated by 32 ^ number of destination blocks) ^ root3)
//	each source block id, then each destination block id: h = fold(h ^ id, root13)
//	each segment: h = fold(h ^ fold(SrcOffset ^ root5, DstOffset ^ root7), ((SrcTensor<<32 | DstTensor) * root11 ^ Bytes) ^ root2)
//	at last: h = fold(h ^ root2, root3)
func Hash(req *Request, segments []Segment) uint64 {
	blocks := bits.RotateLeft64(uint64(len(req.SrcBlocks)), 32) ^ uint64(len(req.DstBlocks))
	h := fold(uint64(len(segments))^root2, blocks^root3)
	for _, id := range req.SrcBlocks {
		h = fold(h^id, root13)
	}
	for _, id := range req.DstBlocks {
		h = fold(h^id, root13)
	}
	for i := range segments {
		s := &segments[i]
		offsets := fold(s.SrcOffset^root5, s.DstOffset^root7)
		rest := (uint64(s.SrcTensor)<<32|uint64(s.DstTensor))*root11 ^ s.Bytes
		h = fold(h^offsets, rest^root2)
	}
	return fold(h^root2, root3)
}

func fold(a, b uint64) uint64 {
	high, low := bits.Mul64(a, b)
	return high ^ low
}
