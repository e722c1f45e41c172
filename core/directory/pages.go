// SPDX-License-Identifier: Apache-2.0

package directory

import (
	"encoding/binary"
	"sync/atomic"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Pages is a peer's end of what a [Publisher] writes. It trusts none of it: any word may have any value, and another one the next time.
// Its methods may be called from many goroutines, for as long as the mapping is there.
type Pages struct{ words []atomic.Uint64 }

// OpenPages reads the header of an owner's pages, which stay the caller's to unmap. It returns an error where they are not a directory that
// this version reads, or not the one of that incarnation.
func OpenPages(m *mem.Mapping, incarnation [16]byte) (*Pages, error) {
	return openWords(m.Words(), incarnation)
}

func openWords(words []atomic.Uint64, incarnation [16]byte) (*Pages, error) {
	if len(words) != pagesWords {
		return nil, unreadable("%d bytes are no directory, which has %d", 8*len(words), pagesBytes)
	}
	if words[atMagic].Load() != magic {
		return nil, unreadable("what the peer shares is no directory")
	}
	for _, expected := range []struct{ at, value uint64 }{
		{atVersion, version}, {atSlots, slots}, {atRecordWords, recordWords}, {atArenaWords, arenaWords},
	} {
		if found := words[expected.at].Load(); found != expected.value {
			return nil, unreadable("the directory has %d in word %d, not %d", found, expected.at, expected.value).
				Hinting("run the same version on both ends")
		}
	}
	if words[atIncarnation].Load() != binary.LittleEndian.Uint64(incarnation[:8]) ||
		words[atIncarnation+1].Load() != binary.LittleEndian.Uint64(incarnation[8:]) {
		return nil, unreadable("the directory is another engine's")
	}
	return &Pages{words}, nil
}

func unreadable(format string, args ...any) *status.Error {
	return status.Newf(status.Failed, status.StageHandshake, format, args...)
}

// Find copies the record of a generation, if it is [Pages.Live]. What it returns makes sense, whatever the owner has written: the kind is
// one of the two, Stride * Count is TensorBytes and not 0, all tensors together have at most MaxInt64 bytes, there is an address for each,
// and no tensor runs beyond the address space. Which pools there are, and how large, is the caller's to check. Addrs is the caller's.
//
// It looks where the generation would be, then at all other slots, once.
func (p *Pages) Find(generation uint64) (Record, Ref, bool) {
	if generation == 0 {
		return Record{}, Ref{}, false
	}
	for probe := range uint64(slots) {
		slot := (home(generation) + probe) % slots
		if p.words[generationsAt+slot].Load() == generation {
			ref := Ref{Slot: uint32(slot), Generation: generation}
			r, ok := p.read(ref)
			if !ok {
				return Record{}, Ref{}, false
			}
			return r, ref, true
		}
	}
	return Record{}, Ref{}, false
}

// read copies one record, and looks for the generation again. One that has changed meanwhile is in the same bounds, and dropped.
func (p *Pages) read(ref Ref) (Record, bool) {
	record := recordOf(p.words, uint64(ref.Slot))
	traits, at := record[inTraits].Load(), record[inRun].Load()
	r := Record{
		ID:         int64(record[inID].Load()),
		Generation: ref.Generation,
		Shape: plan.Shape{
			Kind:        plan.Kind(traits & traitKind),
			Tensors:     uint32(at),
			TensorBytes: record[inBytes].Load(),
			Stride:      record[inStride].Load(),
			Count:       record[inCount].Load(),
		},
		Accessible: traits&traitAccessible != 0,
		Pool:       uint32(traits >> traitPoolShift),
		HasKey:     record[inNames].Load()&namedByKey != 0,
		Model:      record[inModel].Load(),
	}
	first := at >> 32
	if traits&traitNone != 0 || !r.sound() || first > arenaWords-uint64(r.Shape.Tensors) {
		return Record{}, false
	}
	r.Addrs = make([]uintptr, r.Shape.Tensors)
	for i := range r.Addrs {
		addr := p.words[arenaAt+first+uint64(i)].Load()
		if !fits(addr, r.Shape.TensorBytes) {
			return Record{}, false
		}
		r.Addrs[i] = uintptr(addr)
	}
	return r, p.Live(ref)
}

// Live says that the memory of what was found was its own until now, so that what the caller has read of it before is the generation's.
// It is false for good when the generation was withdrawn, and when the owner has ended or died.
func (p *Pages) Live(ref Ref) bool {
	mem.LoadFence()
	return p.words[atDead].Load() == 0 && mem.Vowed(p.words[atVowed].Load()) && p.stands(ref)
}

// Named says that the owner, which is there still, would find the generation under a name.
func (p *Pages) Named(ref Ref, name Name) bool {
	if !p.stands(ref) {
		return false
	}
	record := recordOf(p.words, uint64(ref.Slot))
	bit := uint64(namedByID)
	if name.ByKey {
		if record[inModel].Load() != name.Model {
			return false
		}
		bit = namedByKey
	}
	// The names were this generation's if it stands before and after.
	return record[inNames].Load()&bit != 0 && p.Live(ref)
}

// stands says that the generation is in its slot.
func (p *Pages) stands(ref Ref) bool {
	return ref.Slot < slots && ref.Generation != 0 && p.words[generationsAt+ref.Slot].Load() == ref.Generation
}
