// SPDX-License-Identifier: Apache-2.0

package directory

import (
	"sync/atomic"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
)

// The pages are words of 64 bits: one page of header, then the generation of each slot, a record for each slot, and an arena of words
// for the addresses of tensors. A cache has a slot, and a run in the arena. Pages that were never touched take no memory.
//
//	header       what it is (checked once, when the pages are opened), whether the owner has ended
//	generations  of the cache in each slot; 0: the slot is free
//	records      of the cache in each slot
//	arena        addresses
//
// The generation is the sequence number of its slot. It is written last and cleared first, and never comes back, so that a reader who
// finds the same one before and after has read one record, whole, except for the word of names: that one only loses bits meanwhile. A
// reader who doesn't has found nothing, and does not try again: it asks the owner.
//
// # Order
//
// Words are read and written by Go's atomics, which are sequentially consistent among themselves, also between processes: they are the
// same instructions. What they don't order, on machines like arm64, are the plain accesses to the memory that the words tell of:
//
//	owner                              reader
//	generation := 0                    the bytes of the cache are read
//	full fence                         load fence
//	the memory is given back or used   generation is still the one that was looked up?
//
// Where the reader got a byte of what came after in the owner, its fence puts the load of the generation behind the load of that byte,
// and the owner's fence puts the end of the generation before the store of it: the reader sees that it has ended. That holds also where
// another thread of the owner's used the memory, which has heard of the withdrawal from the one that did it, and where it was the
// kernel that took the page away. When the owner ends for good the dead word stands for all generations, in the same order.
//
// Found is what was published whole: the generation is stored after the record and the memory's earlier life, and loaded before the
// bytes are; both are what the atomics order by themselves (release and acquire).
//
// An owner that dies without a word is told from one that lives by its vow, a word that the kernel marks then.
const (
	magic   = 0x73726944444d4c4c // "LLMDDirs"
	version = 1                  // of all that is in this file; another one is not read

	slots = 4096 // caches at a time, of one engine; those beyond are not in the directory
	// recordWords makes a record one line of the processor's cache.
	recordWords = 8
	// arenaWords is on average 256 tensors for each slot.
	arenaWords = 1 << 20

	generationsAt = 512 // behind a page of header
	recordsAt     = generationsAt + slots
	arenaAt       = recordsAt + slots*recordWords
	pagesWords    = arenaAt + arenaWords
	pagesBytes    = wordBytes * pagesWords
	wordBytes     = 8
)

// The words of the header. What is written once, and what changes, are in different lines of the processor's cache.
const (
	atMagic       = 0
	atVersion     = 1
	atIncarnation = 2 // and 3
	atSlots       = 4
	atRecordWords = 5
	atArenaWords  = 6

	atDead  = 8  // not 0: the owner has ended
	atVow   = 10 // mem.VowBytes, of which the first word is the owner's own
	atVowed = atVow + mem.VowWord/wordBytes
)

// The words of a record.
const (
	inNames  = 0
	inID     = 1
	inTraits = 2
	inModel  = 3
	inRun    = 4 // tensors, and from bit 32 on where their addresses begin in the arena
	inBytes  = 5 // of a tensor
	inStride = 6
	inCount  = 7
)

// The bits of the word of names.
const (
	namedByID  = 1 << 0
	namedByKey = 1 << 1
)

// The bits of the word of traits: the kind in bits 0 to 7, the pool from bit 32 on. All others are 0.
const (
	traitKind       = 0xff
	traitAccessible = 1 << 8
	traitPoolShift  = 32
	traitNone       = 1<<traitPoolShift - 1 - traitAccessible - traitKind
)

// home is the slot where a generation is looked for first. The publisher puts it there or, where that is taken, into the next free one.
func home(generation uint64) uint64 { return generation % slots }

// recordOf is the record of a slot.
func recordOf(words []atomic.Uint64, slot uint64) []atomic.Uint64 {
	return words[recordsAt+slot*recordWords:][:recordWords]
}
