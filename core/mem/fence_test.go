// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

// inStep runs two sides many times, each round begun by both at once, with judge between the rounds.
func inStep(rounds int, left, right, judge func()) {
	var at [2]atomic.Int64
	meet := func(side int, round int64) {
		at[side].Store(round)
		for spins := 0; at[1-side].Load() < round; spins++ {
			if spins%100 == 99 {
				runtime.Gosched()
			}
		}
	}
	var other sync.WaitGroup
	other.Go(func() {
		for i := range int64(rounds) {
			meet(1, 3*i+1)
			right()
			meet(1, 3*i+2)
			meet(1, 3*i+3)
		}
	})
	for i := range int64(rounds) {
		meet(0, 3*i+1)
		left()
		meet(0, 3*i+2)
		judge()
		meet(0, 3*i+3)
	}
	other.Wait()
}

const (
	litmusRounds = 300
	// litmusLines are gone along by both sides at once, which come close to one another somewhere on the way. On an idle machine this many
	// lines and rounds find a fence that is missing nearly each time, on a busy one each other time.
	litmusLines = 1000
	lineBytes   = 128
)

// litmus is two words a line, far from one another, outside of what the race detector watches; and what each side has seen in each line.
type litmus struct {
	memory      []byte
	left, right [litmusLines]byte
}

func newLitmus(t testing.TB) *litmus {
	return &litmus{memory: pages(t, 2*litmusLines*lineBytes/page+1).Bytes()}
}

func (l *litmus) words(line int) (x, y *byte) {
	return &l.memory[line*lineBytes], &l.memory[(litmusLines+line)*lineBytes]
}

// Each side stores, fences, and looks at what the other side stores: one of them has to see it.
func TestFullFenceMakesStoresVisibleBeforeLoads(t *testing.T) {
	l := newLitmus(t)
	inStep(litmusRounds,
		func() {
			for i := range litmusLines {
				x, y := l.words(i)
				*x = 1
				FullFence()
				l.left[i] = *y
			}
		},
		func() {
			for i := range litmusLines {
				x, y := l.words(i)
				*y = 1
				FullFence()
				l.right[i] = *x
			}
		},
		func() {
			for i := range litmusLines {
				require.NotZero(t, l.left[i]+l.right[i])
			}
			clear(l.memory)
		})
}

// What was loaded after the fence is at least as new as what was loaded before it.
func TestLoadFenceKeepsLoadsInOrder(t *testing.T) {
	l := newLitmus(t)
	inStep(litmusRounds,
		func() {
			for i := range litmusLines {
				payload, flag := l.words(i)
				*payload = 1
				FullFence()
				*flag = 1
			}
		},
		func() {
			for i := range litmusLines {
				payload, flag := l.words(i)
				l.left[i] = *flag
				LoadFence()
				l.right[i] = *payload
			}
		},
		func() {
			for i := range litmusLines {
				require.GreaterOrEqual(t, l.right[i], l.left[i])
			}
			clear(l.memory)
		})
}

// A reader that has seen the word that is stored after a streaming copy sees the copy.
func TestStreamingStoresAreVisibleWhenTheirCopyHasReturned(t *testing.T) {
	const size = 8 << 10
	src, dst, flag := pages(t, size/page), pages(t, size/page), pages(t, 1)
	flagged, last := uint64(0), byte(0)
	round := byte(0)
	word := &words(flag.Bytes())[0]
	inStep(5000,
		func() {
			_ = Stores(1<<30).Copy([]Move{{dst.Addr(), src.Addr(), size}}, 0, size) // stores don't fail
			word.Store(uint64(round))
		},
		func() {
			flagged = word.Load()
			last = dst.Bytes()[size-1]
		},
		func() {
			if flagged == uint64(round) {
				require.Equal(t, src.Bytes()[size-1], last)
			}
			round++
			src.Bytes()[size-1] = round
		})
}
