// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// What a push promises, over every way of moving bytes.

func (n *node) push(to *node, src *memory, call PushCall) error {
	ctx, cancel := within(patient)
	defer cancel()
	return n.pushWithin(ctx, to, src, call)
}

func (n *node) pushWithin(ctx context.Context, to *node, src *memory, call PushCall) error {
	call.Cluster, call.Cache = to.id, src.id
	if call.TensorsPerLayer == 0 {
		call.TensorsPerLayer = 2
	}
	return n.Push(ctx, &call)
}

// toKey is a push of everything there is.
func toKey(key transport.Key) PushCall { return PushCall{Key: key, Plan: all()} }

// pushCase is one push that works.
type pushCase struct {
	name       string
	src, dst   cache.Desc
	owned      bool // both caches are allocated
	keys       []cache.Key
	key        func(dst *memory) transport.Key // nil: by raw addresses
	blockBytes uint64
	change     func(p *plan.Request)
}

var pushCases = []pushCase{
	{name: "a whole row", src: rows(4, 1, 1000), dst: rows(4, 1, 1000), key: rowOf(0)},
	{name: "one row into another", src: rows(2, 3, 500), dst: rows(2, 2, 500), owned: true, key: rowOf(1),
		change: func(p *plan.Request) { p.SrcBatch, p.DstBatch = 2, 1 }},
	{name: "a row into a longer one", src: rows(2, 2, 300), dst: rows(2, 2, 500), key: rowOf(1),
		change: func(p *plan.Request) { p.SrcBatch, p.DstBatch = 1, 1 }},
	{name: "many megabytes", src: rows(2, 1, 3<<20+13), dst: rows(2, 1, 3<<20+13), owned: true, key: rowOf(0)},
	{name: "some layers", src: rows(4, 1, 600), dst: rows(6, 1, 600), key: rowOf(0),
		change: tensorsOf(plan.Range{Count: 2}, plan.Range{First: 4, Count: 2})},
	{name: "blocks to blocks", src: blocks(2, 8, 40), dst: blocks(2, 4, 40), keys: paged, key: named(blocksKey(3)),
		change: intoBlocks([]uint64{5, 6, 1}, []uint64{0, 1, 3})},
	{name: "blocks to blocks of a layer", src: blocks(4, 8, 40), dst: blocks(4, 4, 40), owned: true, keys: paged, key: named(blocksKey(3)),
		blockBytes: 40, change: func(p *plan.Request) {
			intoBlocks([]uint64{7, 0}, []uint64{3, 2})(p)
			tensorsOf(plan.Range{First: 2, Count: 2}, plan.Range{Count: 2})(p)
		}},
	{name: "a row into blocks", src: rows(2, 2, 80), dst: blocks(2, 4, 40), key: rowOf(0), blockBytes: 40,
		change: func(p *plan.Request) { p.SrcBatch, p.DstBlocks = 1, []uint64{3, 0} }},
	{name: "a row into blocks, with a tail", src: rows(2, 1, 100), dst: blocks(2, 4, 40), key: rowOf(0), blockBytes: 40,
		change: intoBlocks(nil, []uint64{2, 0, 1})},
	{name: "block 0 into a row", src: blocks(2, 4, 40), dst: rows(2, 2, 50), key: rowOf(1), change: func(p *plan.Request) { p.DstBatch = 1 }},
	{name: "a row into block 0", src: rows(2, 2, 40), dst: blocks(2, 4, 40), key: rowOf(0), change: func(p *plan.Request) { p.SrcBatch = 1 }},
	{name: "rows at addresses", src: rows(4, 2, 300), dst: rows(4, 1, 300), change: func(p *plan.Request) { p.SrcBatch = 1 }},
	{name: "some layers at addresses", src: rows(4, 2, 300), dst: rows(2, 1, 300), owned: true,
		change: tensorsOf(plan.Range{First: 2, Count: 2}, everything)},
	{name: "blocks at addresses", src: blocks(2, 8, 40), dst: blocks(2, 4, 40), owned: true, change: intoBlocks([]uint64{5, 6, 1}, []uint64{0, 1, 3})},
	{name: "a row into blocks at addresses", src: rows(2, 2, 100), dst: blocks(2, 4, 40), blockBytes: 40,
		change: func(p *plan.Request) { p.SrcBatch, p.DstBlocks = 1, []uint64{3, 0, 1} }},
	{name: "block 0 at addresses", src: blocks(2, 8, 40), dst: blocks(2, 4, 40)},
}

func TestPushMovesTheNamedBytesAndNoOthers(t *testing.T) {
	over(t, everyWay, func(w *world) {
		pusher, receiver := w.pair()
		for i, c := range pushCases {
			w.runPush(pusher, receiver, c, uint64(i))
			w.runPush(receiver, pusher, c, uint64(i)) // against the direction of the dial
		}
	})
}

func TestOneSidedPushMovesTheNamedBytesAndNoOthers(t *testing.T) {
	over(t, everyWay, func(w *world) {
		pusher, receiver := w.pair(oneSided)
		for i, c := range pushCases {
			w.runPush(pusher, receiver, c, uint64(i))
		}
	})
}

func (w *world) runPush(pusher, receiver *node, c pushCase, seed uint64) {
	w.t.Helper()
	from, to := pusher.register, receiver.register
	if c.owned {
		from, to = pusher.allocate, receiver.allocate
	}
	src, dst := from(c.src).fill(2*seed), to(c.dst, c.keys...).fill(2*seed+1)
	defer src.remove()
	defer dst.remove()
	call := PushCall{Plan: all(), BlockBytes: c.blockBytes}
	if c.change != nil {
		c.change(&call.Plan)
	}
	source, want := src.content(), dst.afterPush(call.Plan, src)
	if c.key != nil {
		call.Key = c.key(dst)
	} else {
		for _, addr := range dst.addrs {
			call.Addrs = append(call.Addrs, uint64(addr))
		}
	}
	for range 2 {
		require.NoError(w.t, pusher.push(receiver, src, call), c.name)
		require.True(w.t, dst.equals(want), c.name)
		require.True(w.t, src.equals(source), "%s: the source was written", c.name)
		require.Zero(w.t, receiver.Stats().Uses, c.name)
		require.Equal(w.t, len(c.keys), receiver.Stats().Keys, c.name)
		dst.fill(2*seed + 1)
	}
}

// afterPush is what the cache holds when a push has come from src: spec §8.9, byte by byte.
func (c *memory) afterPush(p plan.Request, src *memory) [][]byte {
	if len(p.DstBlocks) > 0 {
		return c.after(p, src.content(), src.desc, p.SrcBatch)
	}
	p.Size = src.desc.Dims[1]
	return c.after(p, src.content(), src.desc, p.SrcBatch)
}
