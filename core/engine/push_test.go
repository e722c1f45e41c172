// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
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

// pushRefusal is one push that does not work.
type pushRefusal struct {
	name   string
	code   status.Code
	stage  status.Stage
	key    transport.Key
	change func(*PushCall)
	mapped bool // found in the receiver's memory map, where a device's memory is not
}

func pushingBlocks(src, dst []uint64) func(*PushCall) {
	return func(c *PushCall) {
		c.Cache = blocksID
		c.Plan.SrcBlocks, c.Plan.DstBlocks = src, dst
	}
}

func cutting(blockBytes uint64, dst ...uint64) func(*PushCall) {
	return func(c *PushCall) { c.BlockBytes, c.Plan.DstBlocks = blockBytes, dst }
}

func pushPlanned(f func(*plan.Request)) func(*PushCall) { return func(c *PushCall) { f(&c.Plan) } }

// The caches are those of refusing; the receiver is the owner there. Spec §8.9, row by row.
var pushRefusals = []pushRefusal{
	{name: "unknown local cache", code: status.CacheNotExist, stage: status.StageCheck, key: id(rowsID, 0), change: func(c *PushCall) { c.Cache = 99 }},
	{name: "own cluster", code: status.ParamInvalid, stage: status.StageCheck, key: id(rowsID, 0), change: func(c *PushCall) { c.Cluster = 2 }},
	{name: "not linked", code: status.NotYetLink, stage: status.StageCheck, key: id(rowsID, 0), change: func(c *PushCall) { c.Cluster = 77 }},
	{name: "unknown id", code: status.CacheNotExist, stage: status.StageLookup, key: id(99, 0)},
	{name: "unknown blocks key", code: status.CacheNotExist, stage: status.StageLookup, key: blocksKey(4), change: pushingBlocks([]uint64{0}, []uint64{0})},
	{name: "remote layer", code: status.ParamInvalid, stage: status.StageCheck, key: id(rowsID, 0),
		change: pushPlanned(tensorsOf(plan.Range{Count: 2}, plan.Range{First: 4, Count: 2}))},
	{name: "uneven layers", code: status.ParamInvalid, stage: status.StageCheck, key: id(rowsID, 0),
		change: pushPlanned(tensorsOf(plan.Range{Count: 2}, plan.Range{Count: 4}))},
	{name: "remote batch", code: status.ParamInvalid, stage: status.StageCheck, key: id(rowsID, 3), change: pushPlanned(func(p *plan.Request) { p.DstBatch = 3 })},
	{name: "remote block", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3), change: pushingBlocks([]uint64{0}, []uint64{4})},
	{name: "remote blocks of another size", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3), change: cutting(20, 0)},
	{name: "blocks into rows", code: status.ParamInvalid, stage: status.StageCheck, key: id(rowsID, 0), change: pushingBlocks([]uint64{0}, []uint64{0})},
	{name: "second row of a cache of blocks", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3),
		change: func(c *PushCall) { c.Cache, c.Plan.DstBatch = blocksID, 1 }},
	{name: "a row longer than the remote one", code: status.ParamInvalid, stage: status.StageCheck, key: normal(9)},
	{name: "a row longer than a remote block", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3)},
	{name: "remote memory is not mapped", code: status.ParamInvalid, stage: status.StageCheck, key: id(unmappedID, 0), mapped: true},
	{name: "a kind of key that there is not", code: status.ParamInvalid, stage: status.StageLookup, key: transport.Key{Kind: 9}},
	{name: "local layer", code: status.ParamInvalid, stage: status.StageCheck, key: id(rowsID, 0),
		change: pushPlanned(tensorsOf(plan.Range{First: 4, Count: 2}, plan.Range{Count: 2}))},
	{name: "tensors per layer", code: status.ParamInvalid, stage: status.StageCheck, key: id(rowsID, 0), change: func(c *PushCall) { c.TensorsPerLayer = 3 }},
	{name: "no tensors per layer", code: status.ParamInvalid, stage: status.StageCheck, key: id(rowsID, 0), change: func(c *PushCall) { c.TensorsPerLayer = 0 }},
	{name: "too few addresses", code: status.ParamInvalid, stage: status.StageCheck, change: func(c *PushCall) { c.Addrs = make([]uint64, 3) }},
	{name: "no addresses", code: status.ParamInvalid, stage: status.StageCheck},
	{name: "local batch", code: status.ParamInvalid, stage: status.StageCheck, key: id(rowsID, 0), change: pushPlanned(func(p *plan.Request) { p.SrcBatch = 2 })},
	{name: "local batch and unknown id", code: status.ParamInvalid, stage: status.StageCheck, key: id(99, 0),
		change: pushPlanned(func(p *plan.Request) { p.SrcBatch = 2 })},
	{name: "second row of local blocks", code: status.ParamInvalid, stage: status.StageCheck, key: id(rowsID, 0),
		change: func(c *PushCall) { c.Cache, c.Plan.SrcBatch = blocksID, 1 }},
	{name: "no size of blocks", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3), change: cutting(0, 0, 1)},
	{name: "blocks of a whole tensor", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3), change: cutting(200, 0)},
	{name: "more blocks than the row has", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3), change: cutting(40, 0, 1, 2, 3)},
	{name: "local rows are no blocks", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3),
		change: pushPlanned(intoBlocks([]uint64{0}, []uint64{0}))},
	{name: "uneven lists", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3), change: pushingBlocks([]uint64{0, 1}, []uint64{0})},
	{name: "source blocks alone", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3), change: pushingBlocks([]uint64{0}, nil)},
	{name: "local block", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3), change: pushingBlocks([]uint64{4}, []uint64{0})},
	{name: "local blocks of another size", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3), change: func(c *PushCall) {
		pushingBlocks([]uint64{0}, []uint64{0})(c)
		c.BlockBytes = 20
	}},
	{name: "local memory is not mapped", code: status.ParamInvalid, stage: status.StageTransfer, key: id(rowsID, 0), change: func(c *PushCall) { c.Cache = unmappedID }},
}

func TestPushRefusals(t *testing.T) {
	over(t, everyWay, func(w *world) {
		receiver, pusher := w.pair()
		w.refusing(receiver, pusher)
		dst := receiver.caches[0]
		for _, r := range pushRefusals {
			before := dst.content()
			w.refusePush(receiver, pusher, r)
			if r.stage != status.StageTransfer {
				require.True(w.t, dst.equals(before), "%s: the destination was written", r.name)
			}
		}
		require.NoError(w.t, pusher.push(receiver, pusher.caches[0], toKey(id(rowsID, 0))), "the link works after all this")
	})
}

func (w *world) refusePush(receiver, pusher *node, r pushRefusal) {
	w.t.Helper()
	call := PushCall{Cluster: receiver.id, Key: r.key, Cache: rowsID, Plan: all(), TensorsPerLayer: 2}
	if r.change != nil {
		r.change(&call)
	}
	ctx, cancel := within(patient)
	defer cancel()
	err := pusher.Push(ctx, &call)
	require.Equal(w.t, r.code, status.CodeOf(err), "%s: %v", r.name, err)
	e := requireCode(w.t, r.code, err)
	require.Equal(w.t, receiver.stageOf(r.stage, r.mapped), e.Stage, "%s: %v", r.name, err)
	require.Zero(w.t, pusher.Stats().Uses+receiver.Stats().Uses, r.name)
}

func TestOneSidedPushRefusals(t *testing.T) {
	over(t, everyWay, func(w *world) {
		receiver, pusher := w.pair(oneSided)
		w.refusing(receiver, pusher)
		closed := receiver.register(rows(4, 2, 100)) // accessible, over memory that is not
		_, err := receiver.Register(rows(4, 2, 100), receiver.malloc(rows(4, 2, 100)), nil, false)
		require.NoError(w.t, err)
		for _, r := range []pushRefusal{
			{name: "local cache is not accessible", code: status.ParamInvalid, stage: status.StageCheck, key: id(rowsID, 0),
				change: func(c *PushCall) { c.Cache = closedID }},
			{name: "remote cache is not accessible", code: status.ParamInvalid, stage: status.StageLookup, key: id(closedID, 0)},
			{name: "id 0 without the key (0, 0)", code: status.CacheNotExist, stage: status.StageLookup, key: id(0, 0)},
		} {
			w.refusePush(receiver, pusher, r)
		}
		receiver.register(rows(4, 2, 100), cache.Key{}).fill(3)
		require.NoError(w.t, pusher.push(receiver, pusher.caches[0], toKey(id(0, 0))), "an id of 0 is the key (0, 0)")
		require.NoError(w.t, pusher.push(receiver, pusher.caches[0], toKey(byID(closed, 0))))
	})
}

func TestRawAddressesOfNoCacheAreRefused(t *testing.T) {
	over(t, everyWay, func(w *world) {
		receiver, pusher := w.pair()
		src := pusher.register(rows(2, 2, 100)).fill(1)
		dst := receiver.register(rows(2, 3, 100)).fill(2)
		stranger := receiver.prepare(rows(2, 1, 100)).fill(3)
		at := func(offset uint64) []uint64 { return []uint64{uint64(dst.addrs[0]) + offset, uint64(dst.addrs[1])} }
		before, theirs := dst.content(), stranger.content()
		for name, call := range map[string]PushCall{
			"memory of nobody": {Addrs: []uint64{uint64(stranger.addrs[0]), uint64(stranger.addrs[1])}, Plan: all()},
			"one of two":       {Addrs: []uint64{uint64(dst.addrs[0]), uint64(stranger.addrs[1])}, Plan: all()},
			"over the end":     {Addrs: at(201), Plan: all()},
			"before":           {Addrs: at(1<<64 - 1), Plan: all()},
			"no address":       {Addrs: []uint64{0, 0}, Plan: all()},
			"a block beyond":   {Addrs: at(0), Plan: plan.Request{SrcTensors: everything, DstTensors: everything, DstBlocks: []uint64{6, 0}}, BlockBytes: 50},
			"a block far away": {Addrs: at(0), Plan: plan.Request{SrcTensors: everything, DstTensors: everything, DstBlocks: []uint64{1 << 62}}, BlockBytes: 50},
		} {
			requireCode(w.t, status.ParamInvalid, pusher.push(receiver, src, call))
			require.True(w.t, dst.equals(before), name)
			require.True(w.t, stranger.equals(theirs), name)
		}
		require.NoError(w.t, pusher.push(receiver, src, PushCall{Addrs: at(200), Plan: all()}), "the last row")
		require.Equal(w.t, src.tensor(0)[:100], dst.tensor(0)[200:])
		dst.remove()
		requireCode(w.t, status.ParamInvalid, pusher.push(receiver, src, PushCall{Addrs: at(0), Plan: all()}))
	})
}

func TestAPushToOneselfIsRefused(t *testing.T) {
	over(t, []way{overTCP, overFabric}, func(w *world) {
		n := w.node("alone", 1)
		n.link(n)
		src := n.register(rows(2, 1, 100))
		requireCode(w.t, status.ParamInvalid, n.push(n, src, toKey(byID(src, 0))))
	})
}

// A peer may push before this end has its session.
func TestAPushWaitsUntilItsLinkIsWhole(t *testing.T) {
	over(t, bubbles, func(w *world) {
		pusher, receiver := w.pair()
		src, dst := pusher.register(rows(2, 1, 1000)).fill(1), receiver.register(rows(2, 1, 1000)).fill(2)
		l, err := receiver.linkTo(pusher.id)
		require.NoError(w.t, err)
		entry, err := pusher.table.Use(src.id)
		require.NoError(w.t, err)
		defer entry.Release()
		push := transport.Push{
			Key: byID(dst, 0), Source: src.id, Generation: entry.Entry().Generation, Shape: entry.Entry().Shape, Plan: all(),
		}
		end := &owner{Engine: receiver.Engine, attached: make(chan struct{})}
		ctx, cancel := within(time.Second)
		defer cancel()
		requireCode(w.t, status.Timeout, end.Receive(ctx, &push))
		waiting := begin(func() error { return end.Receive(context.Background(), &push) })
		w.pass(time.Minute)
		require.False(w.t, waiting.ended())
		require.Zero(w.t, receiver.Stats().Uses)
		end.session = l.Session()
		close(end.attached)
		require.NoError(w.t, waiting.wait())
		dst.requireContent(src.content())
	})
}

// What a pusher says of its own side is compared with the destination before anything is held or pulled.
func TestAPushThatContradictsItselfIsRefused(t *testing.T) {
	over(t, []way{overFabric}, func(w *world) {
		pusher, receiver := w.pair()
		dst := receiver.register(rows(2, 1, 1000)).fill(2)
		before := dst.content()
		l, err := receiver.linkTo(pusher.id)
		require.NoError(w.t, err)
		end := &owner{Engine: receiver.Engine, attached: make(chan struct{}), session: l.Session()}
		close(end.attached)
		address := uint64(dst.addrs[0])
		for what, change := range map[string]func(*transport.Push){
			"no tensors":          func(p *transport.Push) { p.Shape.Tensors = 0 },
			"fewer tensors":       func(p *transport.Push) { p.Shape.Tensors = 1 },
			"too many addresses":  func(p *transport.Push) { p.Addrs = []uint64{address, address, address} },
			"an address too many": func(p *transport.Push) { p.Addrs, p.Shape.Tensors = []uint64{address}, 0 },
		} {
			push := transport.Push{
				Key: byID(dst, 0), Source: 1, Generation: 1, Plan: all(),
				Shape: plan.Shape{Kind: plan.Contiguous, Tensors: 2, TensorBytes: 1000, Stride: 1000, Count: 1},
			}
			change(&push)
			require.Equal(w.t, status.ParamInvalid, status.CodeOf(end.Receive(context.Background(), &push)), what)
			require.Zero(w.t, receiver.Stats().Uses, what)
		}
		dst.requireContent(before)

		gone, cancel := context.WithCancel(context.Background())
		cancel()
		push := transport.Push{Addrs: []uint64{address}, Plan: all(), Shape: plan.Shape{
			Kind: plan.Contiguous, Tensors: 1, TensorBytes: 1000, Stride: 1000, Count: 1,
		}}
		require.Error(w.t, end.Receive(gone, &push), "nobody looks through the table for one who is gone")
		require.Zero(w.t, receiver.Stats().Uses)
	})
}

// Twelve goroutines push to each other at once, six in each direction, some of them in layers, and every byte is theirs.
func TestManyPushesInBothDirectionsAtOnce(t *testing.T) {
	over(t, everyWay, func(w *world) {
		a, b := w.pair()
		const pushers, rounds, size = 12, 20, 40_000
		var src, dst [pushers]*memory
		ends := func(i int) (from, to *node) {
			if i%2 == 0 {
				return a, b
			}
			return b, a
		}
		for i := range pushers {
			from, to := ends(i)
			src[i], dst[i] = from.register(rows(4, 1, size)), to.allocate(rows(4, 1, size))
		}
		together(pushers, func(i int) {
			from, to := ends(i)
			for round := range rounds {
				src[i].fill(uint64(i*rounds + round))
				for layer := range uint32(2) {
					tensors := plan.Range{First: 2 * layer, Count: 2}
					call := toKey(byID(dst[i], 0))
					tensorsOf(tensors, tensors)(&call.Plan)
					if err := from.push(to, src[i], call); err != nil {
						panic(err)
					}
				}
				if !dst[i].equals(src[i].content()) {
					panic("wrong bytes")
				}
			}
		})
		require.Zero(w.t, a.Stats().Uses+b.Stats().Uses)
	})
}

// slowPush begins a push of 8 MiB that takes some seconds of virtual time.
func (w *world) slowPush(timeout time.Duration) (pusher, receiver *node, src, dst *memory, push *running) {
	pusher, receiver = w.pair()
	const size = 8 << 20
	src, dst = pusher.register(rows(1, 1, size)).fill(1), receiver.register(rows(1, 1, size)).fill(2)
	w.slow(pusher, receiver, 2<<20)
	push = begin(func() error {
		ctx, cancel := within(timeout)
		defer cancel()
		return pusher.pushWithin(ctx, receiver, src, PushCall{Key: byID(dst, 0), Plan: all(), TensorsPerLayer: 1})
	})
	w.eventually(func() bool { return receiver.Stats().Uses == 1 }, "the push is under way")
	w.pass(500 * time.Millisecond)
	require.False(w.t, push.ended())
	return pusher, receiver, src, dst, push
}

// requireStill says that nothing of a push that has ended writes into its destination any more, and nothing of it is held.
func (w *world) requireStill(pusher, receiver *node, dst *memory) {
	w.t.Helper()
	w.eventually(func() bool { return pusher.Stats().Uses+receiver.Stats().Uses == 0 }, "nothing is held")
	dst.fill(7)
	before := dst.content()
	w.pass(time.Minute)
	dst.requireContent(before)
}

func TestADeadlineDuringAPushIsConfirmed(t *testing.T) {
	over(t, bubbles, func(w *world) {
		pusher, receiver, src, dst, push := w.slowPush(2 * time.Second)
		began := time.Now()
		e := requireCode(w.t, status.Timeout, push.wait())
		require.NotContains(w.t, e.Cause, "confirmed")
		require.Less(w.t, time.Since(began), 2500*time.Millisecond)
		require.Zero(w.t, receiver.Stats().Uses, "the receiver has let go")
		w.requireStill(pusher, receiver, dst)
		require.NoError(w.t, pusher.push(receiver, src, PushCall{Key: byID(dst, 0), Plan: all(), TensorsPerLayer: 1}))
		dst.requireContent(src.content())
	})
}

func TestACancelledPushIsConfirmed(t *testing.T) {
	over(t, bubbles, func(w *world) {
		pusher, receiver := w.pair()
		src, dst := pusher.register(rows(2, 1, 4<<20)), receiver.register(rows(2, 1, 4<<20))
		w.slow(pusher, receiver, 4<<20) // CANCEL comes behind a frame that is under way
		ctx, cancel := context.WithCancel(context.Background())
		push := begin(func() error { return pusher.pushWithin(ctx, receiver, src, toKey(byID(dst, 0))) })
		w.pass(300 * time.Millisecond)
		cancel()
		e := requireCode(w.t, status.Failed, push.wait())
		require.Contains(w.t, e.Cause, "cancelled")
		require.Zero(w.t, receiver.Stats().Uses)
		w.requireStill(pusher, receiver, dst)
	})
}

// A receiver that is stopped can't confirm. The caller hears that within a second of the deadline, and the next one waits for the answer.
func TestAStoppedReceiverDoesNotConfirm(t *testing.T) {
	over(t, bubbles, func(w *world) {
		pusher, receiver := w.pair(func(o *Options) { o.PeerDead = time.Hour })
		src, dst := pusher.register(rows(2, 1, 1000)).fill(1), receiver.register(rows(2, 1, 1000)).fill(2)
		receiver.host.Pause()
		ctx, cancel := within(time.Second)
		defer cancel()
		began := time.Now()
		e := requireCode(w.t, status.Timeout, pusher.pushWithin(ctx, receiver, src, toKey(byID(dst, 0))))
		require.Equal(w.t, "receiver has not confirmed", e.Cause)
		require.Equal(w.t, 2*time.Second, time.Since(began))
		require.Zero(w.t, pusher.Stats().Uses)
		into := pusher.register(rows(2, 1, 1000))
		for _, next := range []func(ctx context.Context) error{
			func(ctx context.Context) error { return pusher.pushWithin(ctx, receiver, src, toKey(byID(dst, 0))) },
			func(ctx context.Context) error { return pusher.pullWithin(ctx, receiver, byID(dst, 0), into, all()) },
		} {
			ctx, cancel := within(time.Second)
			e = requireCode(w.t, status.Timeout, next(ctx))
			require.Contains(w.t, e.Cause, "deadline")
			cancel()
		}
		later := begin(func() error { return pusher.push(receiver, src, toKey(byID(dst, 0))) })
		w.pass(10 * time.Second)
		require.False(w.t, later.ended())
		receiver.host.Resume()
		require.NoError(w.t, later.wait())
		dst.requireContent(src.content())
		require.NoError(w.t, pusher.pull(receiver, byID(dst, 0), into, all()))
		into.requireContent(src.content())
	})
}

func TestDeathDuringAPush(t *testing.T) {
	over(t, bubbles, func(w *world) {
		pusher, receiver, _, _, push := w.slowPush(time.Minute)
		receiver.crash()
		e := requireCode(w.t, status.Failed, push.wait())
		require.Contains(w.t, e.Cause, "peer died")
		require.Zero(w.t, pusher.Stats().Uses)
		w.eventually(func() bool { return pusher.links.LiveLinks() == 0 }, "the link is dead")
	})
	over(t, bubbles, func(w *world) {
		pusher, receiver, _, dst, push := w.slowPush(time.Minute)
		pusher.crash()
		require.Error(w.t, push.wait())
		w.eventually(func() bool { return receiver.links.LiveLinks() == 0 }, "the link is dead")
		w.requireStill(pusher, receiver, dst)
	})
}

func TestUnregisterDuringAPush(t *testing.T) {
	for name, doomed := range map[string]func(src, dst *memory) *memory{
		"source":      func(src, _ *memory) *memory { return src },
		"destination": func(_, dst *memory) *memory { return dst },
	} {
		t.Run(name, func(t *testing.T) {
			over(t, bubbles, func(w *world) {
				pusher, receiver, src, dst, push := w.slowPush(time.Hour)
				began := time.Now()
				doomed(src, dst).remove() // and does not take as long as the pusher would
				require.Less(w.t, time.Since(began), 2*time.Second)
				requireCode(w.t, status.CacheNotExist, push.wait())
				w.requireStill(pusher, receiver, dst)
				requireCode(w.t, status.CacheNotExist, pusher.push(receiver, src, PushCall{Key: byID(dst, 0), Plan: all(), TensorsPerLayer: 1}))
			})
		})
	}
}

func TestUnlinkWaitsForPushes(t *testing.T) {
	over(t, bubbles, func(w *world) {
		pusher, receiver, src, dst, push := w.slowPush(time.Minute)
		require.NoError(w.t, receiver.unlink(pusher, false))
		require.NoError(w.t, push.wait(), "it had the time that it needs")
		dst.requireContent(src.content())
		requireCode(w.t, status.NotYetLink, pusher.push(receiver, src, PushCall{Key: byID(dst, 0), Plan: all(), TensorsPerLayer: 1}))
	})
}

// The same cluster id, address and cache id, and another life of the receiver: a push by the old link writes nothing there.
func TestAPushNeverReachesAnotherIncarnation(t *testing.T) {
	over(t, append([]way{directBubble}, everyWay...), func(w *world) {
		pusher, receiver := w.pair()
		src, old := pusher.register(rows(2, 1, 9000)).fill(1), receiver.register(rows(2, 1, 9000)).fill(2)
		require.NoError(w.t, pusher.push(receiver, src, toKey(byID(old, 0))))
		receiver.crash()
		again := w.node("puller", 2)
		now := again.register(rows(2, 1, 9000)).fill(3)
		require.Equal(w.t, old.id, now.id)
		before := now.content()
		err := pusher.push(again, src, toKey(byID(now, 0)))
		require.Contains(w.t, []status.Code{status.Failed, status.NotYetLink}, status.CodeOf(err), "%v", err)
		again.link(pusher)
		now.requireContent(before)
		require.NoError(w.t, pusher.push(again, src, toKey(byID(now, 0))))
		now.requireContent(src.content())
	})
}

// A source that is replaced under the same id of the receiver's view brings bytes of one version or none.
func TestPushesOfASourceThatIsReplacedBringOneVersion(t *testing.T) {
	over(t, []way{overTCP, overSHM, overFabric, overDirect}, func(w *world) {
		pusher, receiver := w.pair()
		const size, rounds = 200_000, 30
		dst := receiver.register(rows(2, 1, size)).fill(1000)
		src := pusher.prepare(rows(2, 1, size))
		for round := range uint64(rounds) {
			require.NoError(w.t, src.fill(round).enter())
			want := src.content()
			push := begin(func() error { return pusher.push(receiver, src, toKey(byID(dst, 0))) })
			if round%2 == 1 {
				src.remove()
				src.fill(1000 + round) // never to be seen
			}
			err := push.wait()
			if err != nil {
				requireCode(w.t, status.CacheNotExist, err)
			} else {
				dst.requireContent(want)
			}
			src.remove()
		}
	})
}
