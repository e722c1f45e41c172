// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

func TestParsePoolConfig(t *testing.T) {
	for text, want := range map[string]PoolConfig{
		`{"memory_size": 102428800}`:                                           {102428800, 16},
		`{"memory_size":1024,"page_shift":10}`:                                 {1024, 10},
		`{"memory_size":1073741824,"page_shift":30}`:                           {1 << 30, 30},
		` { "memory_size" : 65536 , "page_shift" : 16 } `:                      {65536, 16},
		`{"memory_size":65536,"other":[1,{}]}`:                                 {65536, 16},
		`{"memory_size":1,"memory_size":65536}`:                                {65536, 16},
		fmt.Sprintf(`{"memory_size":%d,"page_shift":10}`, uint64(1<<32-2)<<10): {(1<<32 - 2) << 10, 10},
	} {
		got, err := ParsePoolConfig(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
	}
	for _, text := range []string{
		``, ` `, `null`, `[]`, `1`, `"x"`, `{}`, `{`, `{"memory_size":65536}x`, `{"memory_size":65536`,
		`{"Memory_Size":65536}`, `{"page_shift":16}`, `{"memory_size":null}`, `{"memory_size":"65536"}`, `{"memory_size":65536.0}`,
		`{"memory_size":6e5}`, `{"memory_size":-65536}`, `{"memory_size":-0}`, `{"memory_size":true}`, `{"memory_size":[65536]}`,
		`{"memory_size":18446744073709551616}`, `{"memory_size":0}`, `{"memory_size":65535}`,
		`{"memory_size":65536,"page_shift":9}`, `{"memory_size":4294967296,"page_shift":31}`, `{"memory_size":65536,"page_shift":null}`,
		`{"memory_size":65536,"page_shift":"16"}`, `{"memory_size":65536,"page_shift":-16}`, `{"memory_size":65536,"page_shift":16.5}`,
		`{"memory_size":65536,"page_shift":17}`, `{"memory_size":65536,"page_shift":266}`,
		fmt.Sprintf(`{"memory_size":%d,"page_shift":10}`, uint64(1<<32-1)<<10),
	} {
		_, err := ParsePoolConfig(text)
		require.ErrorIs(t, err, status.ParamInvalid, text)
		require.Equal(t, status.StageCheck, status.From(err, "").Stage)
	}
}

func FuzzParsePoolConfig(f *testing.F) {
	for _, seed := range []string{`{"memory_size": 102428800}`, `{"memory_size":65536,"page_shift":10}`, `{"memory_size":-1}`, `null`, `{`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		config, err := ParsePoolConfig(text)
		if err != nil {
			require.ErrorIs(t, err, status.ParamInvalid)
			return
		}
		require.GreaterOrEqual(t, config.PageShift, uint(10))
		require.Less(t, config.PageShift, uint(31))
		require.NotZero(t, config.pages())
		require.Less(t, config.pages(), uint64(1<<32-1))
		again, err := ParsePoolConfig(fmt.Sprintf(`{"page_shift":%d,"memory_size":%d}`, config.PageShift, config.Bytes))
		require.NoError(t, err)
		require.Equal(t, config, again)
	})
}

func TestAllocationIsAllOrNothing(t *testing.T) {
	table := newTable(t)
	a, err := table.Allocate(rows(3, 1, 5<<16), nil) // 15 of 16 pages
	require.NoError(t, err)
	_, err = table.Allocate(rows(2, 1, 1), nil)
	require.ErrorIs(t, err, status.OutOfMemory)
	require.Equal(t, status.StageCheck, status.From(err, "").Stage)
	b, err := table.Allocate(rows(1, 1, 1), nil)
	require.NoError(t, err, "the last page was not kept by the failure")
	_, err = table.Allocate(rows(1<<31, 1, 1), nil)
	require.ErrorIs(t, err, status.OutOfMemory)
	require.NoError(t, table.Deallocate(a.ID, false))

	// Enough pages, but not side by side: 0-3 free, 4 taken, 5-8 free, 9 taken, 10-14 free, 15 taken.
	taken := []uint64{}
	for _, size := range []int64{4, 1, 4, 1, 5} {
		e, err := table.Allocate(rows(1, 1, size<<16), nil)
		require.NoError(t, err)
		taken = append(taken, uint64(e.ID))
	}
	for _, i := range []int{0, 2, 4} {
		require.NoError(t, table.Deallocate(int64(taken[i]), false))
	}
	before := table.Stats().PoolBytes
	_, err = table.Allocate(rows(3, 1, 4<<16|1), nil)
	require.ErrorIs(t, err, status.OutOfMemory)
	_, err = table.Allocate(rows(2, 1, 5<<16), nil) // one tensor fits, the other doesn't
	require.ErrorIs(t, err, status.OutOfMemory)
	require.Equal(t, before, table.Stats().PoolBytes)
	e, err := table.Allocate(rows(3, 1, 4<<16), nil)
	require.NoError(t, err)
	base := table.pools[Device].memory.Addr()
	require.Equal(t, []uintptr{base, base + 5<<16, base + 10<<16}, e.Addrs)
	for _, id := range []int64{e.ID, b.ID, int64(taken[1]), int64(taken[3])} {
		require.NoError(t, table.Deallocate(id, false))
	}
	requireFree(t, table)
}

func TestFreedPagesGoBackToTheSystem(t *testing.T) {
	table := newTable(t)
	e, err := table.Allocate(rows(2, 1, 4<<16), nil)
	require.NoError(t, err)
	for _, addr := range e.Addrs {
		for i := range mem.View(addr, 4<<16) {
			mem.View(addr, 4<<16)[i] = 1
		}
	}
	require.NoError(t, table.Deallocate(e.ID, false))
	again, err := table.Allocate(rows(2, 1, 4<<16), nil)
	require.NoError(t, err)
	require.Equal(t, e.Addrs, again.Addrs)
	require.Equal(t, make([]byte, 4<<16), mem.View(again.Addrs[1], 4<<16), "new pages, which are zero")
}

// FuzzPool runs sequences of allocations and frees against a bitmap: the pool has to find the lowest run that fits, whenever there
// is one.
func FuzzPool(f *testing.F) {
	f.Add([]byte{1, 2, 3, 0x80, 0x81, 4})
	f.Add([]byte{9, 9, 9, 9, 9, 0x80, 0x82, 0x84, 5, 20, 0x81, 30})
	f.Add([]byte{63, 1, 0x80, 0x81, 64, 0x80})
	f.Fuzz(func(t *testing.T, operations []byte) {
		const pages = 64
		p := &pool{memory: &watchedMemory{Memory: &numbers{}}, pageShift: 10, pages: pages}
		p.free.give(extent{0, pages})
		var bitmap [pages]bool
		var taken []extent
		for _, op := range operations {
			if op >= 0x80 { // free one
				if len(taken) == 0 {
					continue
				}
				i := int(op-0x80) % len(taken)
				mark(bitmap[:], taken[i], false)
				p.give(taken[i : i+1])
				taken = append(taken[:i], taken[i+1:]...)
			} else {
				want := uint64(op%pages) + 1
				start, fits := lowest(bitmap[:], want)
				_, got, err := p.take(1, want<<10-uint64(op&1))
				require.Equal(t, fits, err == nil)
				if fits {
					require.Equal(t, []extent{{start, want}}, got)
					mark(bitmap[:], got[0], true)
					taken = append(taken, got[0])
				}
			}
			checkFree(t, p, bitmap[:])
		}
		p.give(taken)
		require.Zero(t, p.used)
		require.EqualValues(t, pages, p.free.root.pages)
	})
}

// numbers is memory that nobody touches.
type numbers struct{ mem.Memory }

func (numbers) Addr() uintptr { return 1 << 40 }

func mark(bitmap []bool, run extent, taken bool) {
	for i := run.start; i < run.end(); i++ {
		bitmap[i] = taken
	}
}

func lowest(bitmap []bool, want uint64) (start uint64, fits bool) {
	length := uint64(0)
	for i, taken := range bitmap {
		if length++; taken {
			length = 0
		}
		if length == want {
			return uint64(i) + 1 - want, true
		}
	}
	return 0, false
}

// checkFree compares the free set with the bitmap, and checks the order, the heap and the sums of the tree.
func checkFree(t *testing.T, p *pool, bitmap []bool) {
	free := make([]bool, len(bitmap))
	for i := range free {
		free[i] = true
	}
	last, sum := uint64(0), uint64(0)
	var walk func(*extentNode)
	walk = func(n *extentNode) {
		if n == nil {
			return
		}
		walk(n.left)
		require.True(t, sum == 0 || n.start > last, "sorted, and joined with its neighbour")
		last = n.end()
		sum += n.pages
		mark(free, n.extent, false)
		require.Equal(t, max(n.pages, n.left.most(), n.right.most()), n.largest)
		for _, child := range []*extentNode{n.left, n.right} {
			require.True(t, child == nil || child.priority <= n.priority)
		}
		walk(n.right)
	}
	walk(p.free.root)
	require.Equal(t, bitmap, free)
	require.Equal(t, p.pages-sum, p.used)
}

func BenchmarkPoolFragmented(b *testing.B) {
	p := &pool{memory: &numbers{}, pageShift: 10, pages: 1 << 20}
	p.free.give(extent{0, p.pages})
	var every []extent
	for range p.pages / 4 {
		_, got, err := p.take(1, 4<<10)
		require.NoError(b, err)
		every = append(every, got[0])
	}
	for i := 0; i < len(every); i += 2 {
		p.give(every[i : i+1])
	}
	for b.Loop() {
		_, got, err := p.take(1, 3<<10)
		if err != nil {
			b.Fatal(err)
		}
		p.give(got)
	}
}
