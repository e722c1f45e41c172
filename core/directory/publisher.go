// SPDX-License-Identifier: Apache-2.0

package directory

import (
	"encoding/binary"
	"errors"
	"sync/atomic"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
)

// Publisher is the owner's end of the pages, the only one that writes. Its methods are called one at a time; after Close they do
// nothing.
type Publisher struct {
	pages *mem.Pages
	words []atomic.Uint64 // of pages; nil after Close

	// What follows is known from what was written, but never read back: the pages are seen by others.
	taken [slots]run
	used  int
	arena arena
}

// run is a part of the arena; the zero run stands for a free slot.
type run struct{ first, tensors uint32 }

// NewPublisher makes an empty directory of the engine with that incarnation. It returns status.OutOfMemory where there is no memory for the
// pages, and status.FeatureNotEnabled where the system can't share them.
func NewPublisher(incarnation [16]byte) (*Publisher, error) {
	pages, err := mem.NewPages("llm_datadist directory", pagesBytes)
	if err != nil {
		return nil, err
	}
	if err := mem.Vow(pages.Addr() + wordBytes*atVow); err != nil {
		return nil, errors.Join(err, pages.Close())
	}
	p := &Publisher{pages: pages}
	p.begin(pages.Words(), incarnation)
	return p, nil
}

// begin writes the header into pages that are all 0 but for the vow.
func (p *Publisher) begin(words []atomic.Uint64, incarnation [16]byte) {
	p.words = words
	p.arena.clear()
	words[atIncarnation].Store(binary.LittleEndian.Uint64(incarnation[:8]))
	words[atIncarnation+1].Store(binary.LittleEndian.Uint64(incarnation[8:]))
	words[atSlots].Store(slots)
	words[atRecordWords].Store(recordWords)
	words[atArenaWords].Store(arenaWords)
	words[atVersion].Store(version)
	words[atMagic].Store(magic)
}

// FD returns the descriptor of the pages, for a transport to make one for reading from. It stays ours, and is gone after Close.
func (p *Publisher) FD() int { return p.pages.FD() }

// Bytes returns how large the pages are.
func (p *Publisher) Bytes() uint64 { return pagesBytes }

// Publish shows a cache, named by its id and by its key where it has one, and returns its slot: -1 where there is no room for it, or
// where no peer could use it. Such a cache is just not in the directory.
func (p *Publisher) Publish(r Record) (slot int32) {
	if p.words == nil || p.used == slots || !r.sound() || len(r.Addrs) != int(r.Shape.Tensors) {
		return -1
	}
	for _, addr := range r.Addrs {
		if !fits(uint64(addr), r.Shape.TensorBytes) {
			return -1
		}
	}
	first, ok := p.arena.take(r.Shape.Tensors)
	if !ok {
		return -1
	}
	at := home(r.Generation)
	for p.taken[at].tensors != 0 {
		at = (at + 1) % slots
	}
	p.taken[at] = run{first, r.Shape.Tensors}
	p.used++
	p.write(at, &r)
	p.words[generationsAt+at].Store(r.Generation)
	return int32(at)
}

// write puts all of a record but the generation into a slot, and the addresses into its run.
func (p *Publisher) write(slot uint64, r *Record) {
	at := p.taken[slot]
	names, traits := uint64(namedByID), uint64(r.Shape.Kind)|uint64(r.Pool)<<traitPoolShift
	if r.HasKey {
		names |= namedByKey
	}
	if r.Accessible {
		traits |= traitAccessible
	}
	record := recordOf(p.words, slot)
	record[inNames].Store(names)
	record[inID].Store(uint64(r.ID))
	record[inTraits].Store(traits)
	record[inModel].Store(r.Model)
	record[inRun].Store(uint64(at.first)<<32 | uint64(at.tensors))
	record[inBytes].Store(r.Shape.TensorBytes)
	record[inStride].Store(r.Shape.Stride)
	record[inCount].Store(r.Shape.Count)
	for i, addr := range r.Addrs {
		p.words[arenaAt+uint64(at.first)+uint64(i)].Store(uint64(addr))
	}
}

// Unname says that the owner does not find a cache by its id, or by its key, any more. Its memory is its own still. A slot of -1 is fine.
func (p *Publisher) Unname(slot int32, id, key bool) {
	if !p.has(slot) {
		return
	}
	var names uint64
	if id {
		names |= namedByID
	}
	if key {
		names |= namedByKey
	}
	recordOf(p.words, uint64(slot))[inNames].And(^names)
}

// Withdraw ends a generation: when it returns no reader says any more that it is live, and its memory may be given back or used for
// something else. The slot is free again. A slot of -1 is fine.
func (p *Publisher) Withdraw(slot int32) {
	if !p.has(slot) {
		return
	}
	p.words[generationsAt+slot].Store(0)
	mem.FullFence()
	p.arena.give(p.taken[slot].first, p.taken[slot].tensors)
	p.taken[slot] = run{}
	p.used--
}

func (p *Publisher) has(slot int32) bool {
	return p.words != nil && slot >= 0 && slot < slots && p.taken[slot].tensors != 0
}

// MarkDead ends all generations at once and for good: it comes before the owner gives any memory back. What is published later is found
// by nobody. Calling it again is fine.
func (p *Publisher) MarkDead() {
	if p.words == nil {
		return
	}
	p.words[atDead].Store(1)
	mem.FullFence()
}

// Close marks the directory dead and gives the pages back, which stay with the peers that have mapped them. Closing twice is fine.
func (p *Publisher) Close() error {
	if p.words == nil {
		return nil
	}
	p.MarkDead()
	p.words = nil
	mem.Unvow(p.pages.Addr() + wordBytes*atVow)
	return p.pages.Close()
}
