// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// The suite: what a pull promises, over every way of moving bytes.

func oneSided(o *Options) { o.OneSided = true }

// pullCase is one pull that works.
type pullCase struct {
	name     string
	src, dst cache.Desc
	owned    bool // the source is allocated
	keys     []cache.Key
	key      func(src *memory) transport.Key
	row      uint64 // batch row of the source that the key means
	change   func(p *plan.Request)
	released bool // the key is gone afterwards
}

func named(k transport.Key) func(*memory) transport.Key {
	return func(*memory) transport.Key { return k }
}

func rowOf(batch uint64) func(*memory) transport.Key {
	return func(src *memory) transport.Key { return byID(src, batch) }
}

func tensorsOf(src, dst plan.Range) func(*plan.Request) {
	return func(p *plan.Request) { p.SrcTensors, p.DstTensors = src, dst }
}

func intoBlocks(src, dst []uint64) func(*plan.Request) {
	return func(p *plan.Request) { p.SrcBlocks, p.DstBlocks = src, dst }
}

var (
	everything = plan.Range{All: true}
	two        = []cache.Key{{ID: 7}, {ID: 8}} // of batch rows 0 and 1
	paged      = []cache.Key{{ID: cache.NoID, Model: 3}}
)

var pullCases = []pullCase{
	{name: "a whole row by key", src: rows(4, 1, 1000), dst: rows(4, 1, 1000), keys: two[:1], key: named(normal(7))},
	{name: "the row that the key names", src: rows(2, 2, 4), dst: rows(2, 3, 4), keys: two, key: named(normal(8)), row: 1,
		change: func(p *plan.Request) { p.DstBatch, p.Size = 2, 3 }},
	{name: "as much as the local row has", src: rows(2, 2, 6000), dst: rows(2, 2, 4001), keys: two, key: named(normal(8)), row: 1},
	{name: "one byte", src: rows(2, 1, 9), dst: rows(2, 1, 7), keys: two[:1], key: named(normal(7)), change: func(p *plan.Request) { p.Size = 1 }},
	{name: "many megabytes", src: rows(2, 1, 3<<20+13), dst: rows(2, 1, 3<<20+13), owned: true, keys: two[:1], key: named(normal(7)), released: true},
	{name: "a prefix key is not consumed", src: rows(2, 1, 500), dst: rows(2, 1, 500), owned: true,
		keys: []cache.Key{{ID: 7, Prefix: true}}, key: named(prefix(7))},
	{name: "a key is consumed", src: rows(2, 2, 500), dst: rows(2, 1, 500), owned: true, keys: two, key: named(normal(8)), row: 1, released: true},
	{name: "by id and batch", src: rows(2, 3, 500), dst: rows(2, 1, 500), key: rowOf(2), row: 2},
	{name: "by id and batch of an allocated cache", src: rows(2, 3, 500), dst: rows(2, 1, 500), owned: true, key: rowOf(2), row: 2},
	{name: "by id and batch where a key is bound", src: rows(2, 2, 500), dst: rows(2, 1, 500), owned: true, keys: two, key: rowOf(1), row: 1, released: true},
	{name: "blocks to blocks", src: blocks(2, 8, 40), dst: blocks(2, 4, 40), keys: paged, key: named(blocksKey(3)),
		change: intoBlocks([]uint64{5, 6, 1}, []uint64{0, 1, 3})},
	{name: "blocks to blocks, one block twice", src: blocks(2, 8, 40), dst: blocks(2, 4, 40), owned: true, keys: paged, key: named(blocksKey(3)),
		change: intoBlocks([]uint64{2, 2}, []uint64{3, 0})},
	{name: "blocks to blocks, many", src: blocks(3, 2000, 512), dst: blocks(3, 2000, 512), keys: paged, key: named(blocksKey(3)),
		change: func(p *plan.Request) {
			for i := range uint64(1000) {
				p.SrcBlocks, p.DstBlocks = append(p.SrcBlocks, i*2), append(p.DstBlocks, 1999-i*2)
			}
		}},
	{name: "a row into blocks", src: rows(2, 2, 80), dst: blocks(2, 4, 40), owned: true, keys: two, key: named(normal(8)), row: 1, released: true,
		change: intoBlocks(nil, []uint64{3, 0})},
	{name: "a row into blocks, with a tail", src: rows(2, 1, 100), dst: blocks(2, 4, 40), keys: two[:1], key: named(normal(7)),
		change: intoBlocks(nil, []uint64{2, 0, 1})},
	{name: "a row into blocks, not all of it", src: rows(2, 2, 100), dst: blocks(2, 4, 40), key: rowOf(1), row: 1, change: intoBlocks(nil, []uint64{2, 0})},
	{name: "some layers", src: rows(4, 1, 600), dst: rows(6, 1, 600), keys: two[:1], key: named(normal(7)),
		change: tensorsOf(plan.Range{Count: 2}, plan.Range{First: 4, Count: 2})},
	{name: "some source layers", src: rows(6, 1, 600), dst: rows(2, 1, 600), keys: two[:1], key: named(normal(7)),
		change: tensorsOf(plan.Range{First: 2, Count: 2}, everything)},
	{name: "into some layers", src: rows(2, 1, 600), dst: rows(6, 1, 600), keys: two[:1], key: named(normal(7)),
		change: tensorsOf(everything, plan.Range{First: 4, Count: 2})},
}

func TestPullMovesTheNamedBytesAndNoOthers(t *testing.T) {
	over(t, alsoBack, func(w *world) {
		owner, puller := w.pair()
		for i, c := range pullCases {
			w.runCase(owner, puller, c, uint64(i))
		}
	})
}

func TestPullWorksAgainstTheDirectionOfTheDial(t *testing.T) {
	over(t, everyWay, func(w *world) {
		owner, puller := w.node("owner", 1), w.node("puller", 2)
		owner.link(puller)
		for i, c := range pullCases[:4] {
			w.runCase(owner, puller, c, uint64(i))
		}
	})
}

// oneSidedCases are the cases whose keys one-sided mode has, and what only that mode allows. Nothing is consumed.
func oneSidedCases() (out []pullCase) {
	for _, c := range pullCases {
		if prefixed := len(c.keys) > 0 && c.keys[0].Prefix; !prefixed && c.key(&memory{id: 5}).Kind == transport.KeyCache || len(c.keys) > 0 && c.keys[0].ID == cache.NoID {
			c.released = false
			out = append(out, c)
		}
	}
	return append(out,
		pullCase{name: "a row from the base of blocks", src: blocks(2, 4, 100), dst: rows(2, 1, 60), key: rowOf(0)},
		pullCase{name: "blocks out of rows", src: rows(2, 2, 100), dst: blocks(2, 5, 40), owned: true, key: rowOf(0),
			change: intoBlocks([]uint64{4, 0}, []uint64{1, 2})},
	)
}

func TestOneSidedPullMovesTheNamedBytesAndConsumesNothing(t *testing.T) {
	over(t, alsoBack, func(w *world) {
		owner, puller := w.pair(oneSided)
		for i, c := range oneSidedCases() {
			w.runCase(owner, puller, c, uint64(i))
		}
	})
}

func (w *world) runCase(owner, puller *node, c pullCase, seed uint64) {
	t := w.t
	t.Helper()
	make := owner.register
	if c.owned {
		make = owner.allocate
	}
	src := make(c.src, c.keys...).fill(2 * seed)
	dst := puller.register(c.dst).fill(2*seed + 1)
	defer dst.remove()
	defer src.remove()
	p := all()
	if c.change != nil {
		c.change(&p)
	}
	source, want := src.content(), dst.after(p, src.content(), c.src, c.row)
	require.NoError(t, puller.pull(owner, c.key(src), dst, p), c.name)
	require.True(t, dst.equals(want), c.name)
	require.True(t, src.equals(source), "%s: the source was written", c.name)
	require.Zero(t, owner.Stats().Leases, c.name)
	require.Equal(t, len(c.keys)-count(c.released), owner.Stats().Keys, c.name)
	if c.released {
		return
	}
	dst.fill(2*seed + 1)
	require.NoError(t, puller.pull(owner, c.key(src), dst, p), "%s, again", c.name)
	require.True(t, dst.equals(want), "%s, again", c.name)
}

func count(yes bool) int {
	if yes {
		return 1
	}
	return 0
}

// refusal is one pull that does not work.
type refusal struct {
	name   string
	code   status.Code
	stage  status.Stage
	key    transport.Key
	change func(*PullCall)
	mapped bool // found in the memory map, where a device's memory is not
}

// Of the caches that TestPullRefusals makes.
const (
	rowsID, blocksID = 1, 2 // on both ends
	closedID         = 3    // not accessible, on both ends
	unmappedID       = 4    // at addresses that are not mapped, on both ends
)

func id(cache int64, batch uint64) transport.Key {
	return transport.Key{Kind: transport.KeyCache, CacheID: cache, Batch: batch}
}

func planned(f func(*plan.Request)) func(*PullCall) { return func(c *PullCall) { f(&c.Plan) } }

func paging(src, dst []uint64) func(*PullCall) {
	return func(c *PullCall) {
		c.Cache = blocksID
		c.Plan.SrcBlocks, c.Plan.DstBlocks = src, dst
	}
}

// The local caches have 4 tensors of 2 rows of 100 bytes and of 4 blocks of 40 bytes, the remote ones the same, but 3 rows.
var refusals = []refusal{
	{name: "own cluster", code: status.ParamInvalid, stage: status.StageCheck, key: normal(7), change: func(c *PullCall) { c.Cluster = 2 }},
	{name: "unknown local cache", code: status.CacheNotExist, stage: status.StageCheck, key: normal(7), change: func(c *PullCall) { c.Cache = 99 }},
	{name: "local batch", code: status.ParamInvalid, stage: status.StageCheck, key: normal(7), change: planned(func(p *plan.Request) { p.DstBatch = 2 })},
	{name: "local kind", code: status.ParamInvalid, stage: status.StageCheck, key: normal(7), change: func(c *PullCall) { c.Cache = blocksID }},
	{name: "size beyond the local row", code: status.ParamInvalid, stage: status.StageCheck, key: normal(7), change: planned(func(p *plan.Request) { p.Size = 101 })},
	{name: "size 0", code: status.ParamInvalid, stage: status.StageCheck, key: normal(7), change: planned(func(p *plan.Request) { p.Size = 0 })},
	{name: "local block", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3), change: paging([]uint64{0}, []uint64{4})},
	{name: "uneven lists", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3), change: paging([]uint64{0, 1}, []uint64{0})},
	{name: "source blocks alone", code: status.ParamInvalid, stage: status.StageCheck, key: blocksKey(3), change: paging([]uint64{0}, nil)},
	{name: "tensors per layer", code: status.ParamInvalid, stage: status.StageCheck, key: normal(7), change: func(c *PullCall) {
		c.Plan.SrcTensors, c.TensorsPerLayer = plan.Range{Count: 3}, 3
	}},
	{name: "no tensors per layer", code: status.ParamInvalid, stage: status.StageCheck, key: normal(7), change: func(c *PullCall) {
		c.Plan.SrcTensors, c.TensorsPerLayer = plan.Range{Count: 3}, 0
	}},
	{name: "local layer", code: status.ParamInvalid, stage: status.StageCheck, key: normal(7), change: planned(tensorsOf(plan.Range{Count: 2}, plan.Range{First: 4, Count: 2}))},
	{name: "uneven layers", code: status.ParamInvalid, stage: status.StageCheck, key: normal(7), change: planned(tensorsOf(plan.Range{Count: 2}, plan.Range{Count: 4}))},
	{name: "local memory is not mapped", code: status.ParamInvalid, stage: status.StageCheck, key: normal(7), change: func(c *PullCall) { c.Cache = unmappedID },
		mapped: true},
	{name: "not linked", code: status.NotYetLink, stage: status.StageCheck, key: normal(7), change: func(c *PullCall) { c.Cluster = 77 }},
	{name: "unknown key", code: status.CacheNotExist, stage: status.StageLookup, key: normal(6)},
	{name: "unknown prefix", code: status.CacheNotExist, stage: status.StageLookup, key: prefix(7)},
	{name: "unknown blocks key", code: status.CacheNotExist, stage: status.StageLookup, key: blocksKey(4), change: paging([]uint64{0}, []uint64{0})},
	{name: "unknown id", code: status.CacheNotExist, stage: status.StageLookup, key: id(99, 0)},
	{name: "id below 0", code: status.CacheNotExist, stage: status.StageLookup, key: id(-1, 0)},
	{name: "remote batch", code: status.CacheNotExist, stage: status.StageLookup, key: id(rowsID, 3)},
	{name: "remote layer", code: status.ParamInvalid, stage: status.StageLookup, key: normal(7), change: planned(tensorsOf(plan.Range{First: 4, Count: 4}, everything))},
	{name: "remote tensors", code: status.ParamInvalid, stage: status.StageLookup, key: normal(7), change: planned(tensorsOf(everything, plan.Range{Count: 2}))},
	{name: "remote kind, rows wanted", code: status.ParamInvalid, stage: status.StageLookup, key: blocksKey(3)},
	{name: "remote kind, blocks wanted", code: status.ParamInvalid, stage: status.StageLookup, key: normal(7), change: paging([]uint64{0}, []uint64{0})},
	{name: "remote block", code: status.ParamInvalid, stage: status.StageLookup, key: blocksKey(3), change: paging([]uint64{4}, []uint64{0})},
	{name: "more blocks than the row has", code: status.ParamInvalid, stage: status.StageLookup, key: normal(7), change: paging(nil, []uint64{0, 1, 2, 3})},
	{name: "remote row is too short", code: status.ParamInvalid, stage: status.StageLookup, key: normal(9)},
	{name: "remote memory is not mapped", code: status.ParamInvalid, stage: status.StageTransfer, key: id(unmappedID, 0)},
	{name: "a kind of key that there is not", code: status.ParamInvalid, stage: status.StageLookup, key: transport.Key{Kind: 9}},
}

func unmapped(s mem.Span) bool { return s.Addr < 1<<12 }

// refusing makes the caches that refusals are about, and returns where a pull would go.
func (w *world) refusing(owner, puller *node) *memory {
	t := w.t
	for _, n := range []*node{owner, puller} {
		keys, count := []cache.Key(nil), int64(2)
		if n == owner {
			keys, count = []cache.Key{{ID: 7}}, 3
		}
		require.EqualValues(t, rowsID, n.register(rows(4, count, 100), keys...).fill(1).id)
		if n == owner {
			keys = paged
		}
		require.EqualValues(t, blocksID, n.register(blocks(4, 4, 40), keys...).fill(2).id)
		closed, err := n.Register(rows(4, 2, 100), n.malloc(rows(4, 2, 100)), nil, false)
		require.NoError(t, err)
		require.EqualValues(t, closedID, closed)
		bad, err := n.Register(rows(4, 2, 100), []uintptr{1, 1, 1, 1}, nil, true)
		require.NoError(t, err)
		require.EqualValues(t, unmappedID, bad)
		n.caches = append(n.caches, &memory{n: n, id: closed}, &memory{n: n, id: bad})
		if n.host != nil {
			n.host.FaultSpans(unmapped)
		}
	}
	owner.register(rows(4, 1, 99), cache.Key{ID: 9})
	return puller.caches[0]
}

func TestPullRefusals(t *testing.T) {
	over(t, everyWay, func(w *world) {
		owner, puller := w.pair()
		dst := w.refusing(owner, puller)
		for _, r := range refusals {
			before := dst.content()
			err := w.refuse(owner, puller, r)
			require.Equal(w.t, puller.stageOf(r.stage, r.mapped), err.Stage, "%s: %v", r.name, err)
			if r.stage != status.StageTransfer {
				require.True(w.t, dst.equals(before), "%s: the destination was written", r.name)
			}
		}
		require.NoError(w.t, puller.pull(owner, normal(7), dst, all()), "the link works after all this")
	})
}

// stageOf is where a node refuses its own memory, that of a device not before it copies.
func (n *node) stageOf(stage status.Stage, mapped bool) status.Stage {
	if mapped && n.device != nil {
		return status.StageTransfer
	}
	return stage
}

func (w *world) refuse(owner, puller *node, r refusal) *status.Error {
	w.t.Helper()
	call := PullCall{Cluster: owner.id, Key: r.key, Cache: rowsID, Plan: all(), TensorsPerLayer: 2}
	if r.change != nil {
		r.change(&call)
	}
	ctx, cancel := within(patient)
	defer cancel()
	err := puller.Pull(ctx, &call)
	require.Equal(w.t, r.code, status.CodeOf(err), "%s: %v", r.name, err)
	e := requireCode(w.t, r.code, err)
	if e.Stage != status.StageCheck {
		require.True(w.t, e.HasPeer, r.name)
		require.Equal(w.t, call.Cluster, e.Peer, r.name)
	}
	return e
}

func TestOneSidedPullRefusals(t *testing.T) {
	over(t, everyWay, func(w *world) {
		owner, puller := w.pair(oneSided)
		dst := w.refusing(owner, puller)
		for _, r := range []refusal{
			{name: "local cache is not accessible", code: status.ParamInvalid, key: id(rowsID, 0), change: func(c *PullCall) { c.Cache = closedID }},
			{name: "remote cache is not accessible", code: status.ParamInvalid, key: id(closedID, 0)},
			{name: "remote batch", code: status.CacheNotExist, key: id(rowsID, 3)},
			{name: "unknown id", code: status.CacheNotExist, key: id(99, 0)},
			{name: "prefix keys are those of blocks", code: status.CacheNotExist, key: prefix(7)},
			{name: "remote block", code: status.ParamInvalid, key: id(blocksID, 0), change: paging([]uint64{4}, []uint64{0})},
			{name: "a row longer than a remote block", code: status.ParamInvalid, key: id(blocksID, 0)},
			{name: "remote layer", code: status.ParamInvalid, key: id(rowsID, 0), change: planned(tensorsOf(plan.Range{First: 4, Count: 4}, everything))},
		} {
			w.refuse(owner, puller, r)
		}
		require.NoError(t, puller.pull(owner, id(rowsID, 2), dst, all()))
	})
}

func TestAPullThatDoesNotFitAControlFrameIsRefused(t *testing.T) {
	over(t, everyWay, func(w *world) {
		owner, puller := w.pair()
		owner.register(blocks(1, 4, 8), paged...)
		dst := puller.register(blocks(1, 4, 8))
		p := all()
		p.SrcBlocks, p.DstBlocks = make([]uint64, 300_000), make([]uint64, 300_000)
		e := requireCode(w.t, status.ParamInvalid, puller.pull(owner, blocksKey(3), dst, p))
		require.NotEmpty(w.t, e.Hint)
	})
}

func TestCheckPullMovesNothing(t *testing.T) {
	over(t, []way{overFabric}, func(w *world) {
		owner, puller := w.pair()
		owner.register(rows(2, 1, 10), two[0]).fill(1)
		dst := puller.register(rows(2, 1, 10)).fill(2)
		before := dst.content()
		call := PullCall{Cluster: 1, Key: normal(7), Cache: dst.id, Plan: all()}
		require.NoError(w.t, puller.CheckPull(&call))
		require.True(w.t, dst.equals(before))
		call.Plan.Size = 11
		requireCode(w.t, status.ParamInvalid, puller.CheckPull(&call))
		require.Zero(w.t, puller.Stats().Uses)
	})
}

// Several pulls over one link at once don't disturb each other, in both directions.
func TestPullsShareALink(t *testing.T) {
	over(t, everyWay, func(w *world) {
		a, b := w.pair()
		type job struct {
			from, to *node
			src, dst *memory
		}
		var jobs []job
		for i := range 12 {
			j := job{from: a, to: b}
			if i%3 == 0 {
				j = job{from: b, to: a}
			}
			size := int64(1000 + i*i*i*397)
			j.src, j.dst = j.from.register(rows(2, 1, size)).fill(uint64(i)), j.to.register(rows(2, 1, size))
			jobs = append(jobs, j)
		}
		results := make([]error, len(jobs))
		together(len(jobs), func(i int) {
			for range 5 {
				if err := jobs[i].to.pull(jobs[i].from, byID(jobs[i].src, 0), jobs[i].dst, all()); err != nil {
					results[i] = err
				}
			}
		})
		for i, j := range jobs {
			require.NoError(w.t, results[i])
			j.dst.requireContent(j.src.content())
		}
	})
}

func TestExplainNamesTheTransportAndEveryConnection(t *testing.T) {
	over(t, everyWay, func(w *world) {
		owner, puller := w.pair()
		for _, text := range []string{puller.Explain(1), owner.Explain(2)} {
			transport := "transport: tcp"
			if w.way.shm {
				transport = "transport: shm"
			}
			if w.way.library {
				transport = "transport: cann"
			}
			for _, part := range []string{"linked", transport, "data connection 0", "data connection 1"} {
				require.Contains(w.t, text, part)
			}
		}
		require.Empty(w.t, puller.Explain(77))
		for _, e := range puller.told() {
			require.Equal(w.t, link.Info, e.Level, fmt.Sprint(e))
		}
	})
}
