// SPDX-License-Identifier: Apache-2.0

package transport

import "github.com/fxamacker/cbor/v2"

// terms refuses everything that a few numbers and texts have no use for.
var terms = func() cbor.DecMode {
	mode, err := cbor.DecOptions{
		DupMapKey: cbor.DupMapKeyEnforcedAPF, IndefLength: cbor.IndefLengthForbidden, TagsMd: cbor.TagsForbidden,
		MaxNestedLevels: 4, MaxArrayElements: 16, MaxMapPairs: 16,
	}.DecMode()
	if err != nil {
		panic(err) // the options above are constants
	}
	return mode
}()

// ReadTerms reads into v what a peer says, in CBOR, of its end of a transport. Whoever passes it on has bounded its length.
func ReadTerms(said []byte, v any) error { return terms.Unmarshal(said, v) }
