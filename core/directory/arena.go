// SPDX-License-Identifier: Apache-2.0

package directory

import "math/bits"

const (
	// blockShift makes the smallest block 64 words: small caches in all slots take a quarter of the arena. With blocks of powers of two,
	// caches of up to 256 tensors (arenaWords / slots) always find room, in whatever order others of them came and went.
	blockShift = 6
	blocks     = arenaWords >> blockShift
	orders     = 15 // from one block to all of them
	none       = -1
)

// arena tells which words of the arena are free. It is a buddy allocator: blocks of powers of two, each aligned to its size; one that is
// free is joined with its other half where that is free too. Taking and giving are bounded by the number of orders, and allocate nothing.
type arena struct {
	heads      [orders]int32 // the lists of free blocks
	next, prev [blocks]int32 // in them
	free       [blocks]uint8 // 1 + the order of the free block that begins here; 0: none does
}

// clear makes everything free.
func (a *arena) clear() {
	for order := range a.heads {
		a.heads[order] = none
	}
	a.free = [blocks]uint8{}
	a.push(0, orders-1)
}

// orderOf is the order of the smallest block that has that many words, of which there is at least one.
func orderOf(words uint32) int { return bits.Len32((words - 1) >> blockShift) }

// take finds room for words. It fails where no block that is large enough is free.
func (a *arena) take(words uint32) (first uint32, ok bool) {
	order := orderOf(words)
	from := order
	for from < orders && a.heads[from] == none {
		from++
	}
	if from >= orders {
		return 0, false
	}
	block := a.heads[from]
	a.remove(block)
	for ; from > order; from-- {
		a.push(block+1<<(from-1), from-1)
	}
	return uint32(block) << blockShift, true
}

// give makes what was taken free again.
func (a *arena) give(first, words uint32) {
	block, order := int32(first>>blockShift), orderOf(words)
	for ; order < orders-1; order++ {
		half := block ^ 1<<order
		if a.free[half] != uint8(order)+1 {
			break
		}
		a.remove(half)
		block = min(block, half)
	}
	a.push(block, order)
}

func (a *arena) push(block int32, order int) {
	head := a.heads[order]
	a.next[block], a.prev[block] = head, none
	if head != none {
		a.prev[head] = block
	}
	a.heads[order] = block
	a.free[block] = uint8(order) + 1
}

func (a *arena) remove(block int32) {
	next, prev := a.next[block], a.prev[block]
	if next != none {
		a.prev[next] = prev
	}
	if prev != none {
		a.next[prev] = next
	} else {
		a.heads[a.free[block]-1] = next
	}
	a.free[block] = 0
}
