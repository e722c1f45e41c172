// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// local runs a test with one engine, which needs no network, with caches in host memory and on a device.
func local(t *testing.T, run func(w *world, n *node)) {
	over(t, []way{overFabric, onDevice}, func(w *world) { run(w, w.node("alone", 1)) })
}

var onDevice = way{name: "device", fabric: true, first: true}

func TestCopyCache(t *testing.T) {
	local(t, func(w *world, n *node) {
		for _, make := range []func(cache.Desc, ...cache.Key) *memory{n.register, func(d cache.Desc, k ...cache.Key) *memory { return n.allocate(d, k...) }} {
			for _, c := range []struct {
				call CopyCall
				n    int // bytes that it moves
			}{
				{CopyCall{Size: -1}, 1000},
				{CopyCall{SrcBatch: 1, DstBatch: 2, Size: -1}, 1000},
				{CopyCall{SrcBatch: 1, DstBatch: 0, Offset: 999, Size: -1}, 1},
				{CopyCall{SrcBatch: 0, DstBatch: 1, Offset: 10, Size: 20}, 20},
			} {
				src, dst := make(rows(3, 2, 1000)).fill(1), make(rows(3, 3, 1200)).fill(2)
				want := dst.content()
				for i, b := range want {
					to, from := 1200*c.call.DstBatch+c.call.Offset, 1000*c.call.SrcBatch+c.call.Offset
					copy(b[to:], src.tensor(i)[from:][:c.n])
				}
				c.call.Src, c.call.Dst = src.id, dst.id
				require.NoError(w.t, n.CopyCache(c.call))
				dst.requireContent(want)
			}
		}
		require.Zero(w.t, n.Stats().Uses)
	})
}

func TestCopyCacheInsideOneCache(t *testing.T) {
	local(t, func(w *world, n *node) {
		const row = 3 << 20 // enough for several threads
		c := n.register(rows(2, 2, row)).fill(1)
		want := c.content()
		for _, b := range want {
			copy(b[row:], b[:row])
		}
		require.NoError(w.t, n.CopyCache(CopyCall{Src: c.id, Dst: c.id, DstBatch: 1, Size: -1}))
		c.requireContent(want)
	})
}

func TestCopyCacheRefusals(t *testing.T) {
	local(t, func(w *world, n *node) {
		a, b, small := n.register(rows(2, 2, 100)), n.register(rows(2, 3, 80)), n.register(rows(1, 2, 100))
		call := func(dst, src int64, change func(*CopyCall)) error {
			c := CopyCall{Dst: dst, Src: src, Size: -1}
			if change != nil {
				change(&c)
			}
			return n.CopyCache(c)
		}
		requireCode(w.t, status.CacheNotExist, call(a.id, 99, nil))
		requireCode(w.t, status.CacheNotExist, call(99, a.id, nil))
		for _, err := range []error{
			call(small.id, a.id, nil), // tensors
			call(b.id, a.id, nil),     // the row is too long
			call(a.id, b.id, func(c *CopyCall) { c.SrcBatch = 3 }),
			call(a.id, b.id, func(c *CopyCall) { c.DstBatch = 2 }),
			call(a.id, b.id, func(c *CopyCall) { c.Offset = 80 }),
			call(a.id, b.id, func(c *CopyCall) { c.Size = 81 }),
			call(a.id, b.id, func(c *CopyCall) { c.Offset, c.Size = 1, 80 }),
			call(a.id, b.id, func(c *CopyCall) { c.Size = 0 }),
		} {
			requireCode(w.t, status.ParamInvalid, err)
		}
		require.Zero(w.t, n.Stats().Uses)
	})
}

func TestCopyBlocksInOrder(t *testing.T) {
	local(t, func(w *world, n *node) {
		c := n.allocate(blocks(2, 6, 500), paged...).fill(1)
		want := c.content()
		for _, pair := range [][2]int{{0, 1}, {1, 2}, {2, 0}, {5, 5}} { // the second one copies what the first one wrote
			for _, b := range want {
				copy(b[pair[1]*500:][:500], b[pair[0]*500:])
			}
		}
		require.NoError(w.t, n.CopyBlocks(c.id, []uint64{0, 1, 1, 2, 2, 0, 5, 5}))
		c.requireContent(want)
		require.NoError(w.t, n.CopyBlocks(c.id, nil), "nothing to do")
		requireCode(w.t, status.ParamInvalid, n.CopyBlocks(c.id, []uint64{0, 6}))
		requireCode(w.t, status.ParamInvalid, n.CopyBlocks(c.id, []uint64{6, 0}))
		requireCode(w.t, status.CacheNotExist, n.CopyBlocks(99, []uint64{0, 1}))
		c.requireContent(want)
	})
}

func TestSwapBlocks(t *testing.T) {
	local(t, func(w *world, n *node) {
		desc := blocks(3, 8, 100)
		desc.Placement = cache.Host
		src, dst := n.prepare(desc).fill(1), n.register(blocks(3, 4, 100)).fill(2) // one is in no table
		want := dst.content()
		for i, b := range want {
			copy(b[300:], src.tensor(i)[700:800])
			copy(b[0:100], src.tensor(i)[200:300])
		}
		require.NoError(w.t, n.SwapBlocks(dst.addrs, src.addrs, cache.Device, cache.Host, 100, []uint64{7, 3, 2, 0}))
		dst.requireContent(want)
		require.NoError(w.t, n.SwapBlocks(dst.addrs, src.addrs, cache.Device, cache.Host, 100, nil))
		require.NoError(w.t, n.SwapBlocks(src.addrs, dst.addrs, cache.Host, cache.Device, 100, []uint64{3, 1, 0, 5, 1, 5}), "out again, in order")
		for i, b := range want {
			require.Equal(w.t, b[300:400], src.tensor(i)[100:200])
			require.Equal(w.t, b[100:200], src.tensor(i)[500:600])
		}
	})
}

// Nothing that is not there kills the process: not a source, not a destination, and not memory that can be read only.
func TestLocalCopiesOfMemoryThatIsNotThere(t *testing.T) {
	over(t, []way{overFabric}, func(w *world) {
		n := w.node("alone", 1)
		good := n.register(blocks(1, 4, 100)).fill(1)
		nowhere, readOnly := []uintptr{1 << 12}, w.readOnly()
		bad, err := n.Register(blocks(1, 4, 100), nowhere, nil, true)
		require.NoError(w.t, err)
		still, err := n.Register(blocks(1, 4, 100), []uintptr{readOnly}, nil, true)
		require.NoError(w.t, err)
		n.caches = append(n.caches, &memory{n: n, id: bad}, &memory{n: n, id: still})
		for _, err := range []error{
			n.SwapBlocks(good.addrs, nowhere, cache.Device, cache.Host, 100, []uint64{0, 0}),
			n.SwapBlocks(nowhere, good.addrs, cache.Device, cache.Host, 100, []uint64{0, 0}),
			n.SwapBlocks([]uintptr{readOnly}, good.addrs, cache.Device, cache.Host, 100, []uint64{0, 0}),
			n.CopyCache(CopyCall{Dst: bad, Src: good.id, Size: -1}),
			n.CopyCache(CopyCall{Dst: good.id, Src: bad, Size: -1}),
			n.CopyCache(CopyCall{Dst: still, Src: good.id, Size: -1}),
			n.CopyBlocks(bad, []uint64{0, 1}),
		} {
			requireCode(w.t, status.ParamInvalid, err)
		}
		require.NoError(w.t, n.CopyCache(CopyCall{Dst: good.id, Src: still, Size: -1}), "a source may be read-only")
		require.Equal(w.t, make([]byte, 100), good.tensor(0)[:100])
	})
}

// readOnly maps a page of zeros that can't be written.
func (w *world) readOnly() uintptr {
	page, err := unix.MmapPtr(-1, 0, nil, 4096, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	require.NoError(w.t, err)
	w.t.Cleanup(func() { _ = unix.MunmapPtr(page, 4096) })
	return uintptr(page)
}
