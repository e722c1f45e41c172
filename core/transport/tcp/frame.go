// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"encoding/binary"
	"math"
	"slices"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// Every frame on a data connection starts with a header of 32 bytes, little-endian:
//
//	u8 kind, u8 flags, u16 zero, u32 length of the body, u64 operation, u64 a, u64 b
//
// The operation is numbered by the initiator; which of the two ends that is follows from the kind. A data frame is its header
// (a: offset in the operation's stream of bytes), length bytes, and a trailer of 8 bytes with the status of these bytes: only a frame
// whose trailer is 0 counts, so that a frame that could not be completed from the owner's memory is completed from scratch instead,
// and the stream stays whole.
type header struct {
	kind      frameKind
	flags     uint8
	length    uint32
	operation uint64
	a, b      uint64
}

type frameKind uint8

const (
	kindRequest   frameKind = 1 // initiator: body is a request; a: deadline in ms from now
	kindEntry     frameKind = 2 // owner: body is an entry; comes before the first data frame on each connection used
	kindData      frameKind = 3 // owner
	kindFail      frameKind = 4 // owner: the operation has failed; a: status code, body: cause
	kindCancel    frameKind = 5 // initiator: nothing more is wanted
	kindDone      frameKind = 6 // initiator: every byte has arrived; a: first tensor, b: tensors | parts<<32 (all: flagAll)
	kindConfirmed frameKind = 7 // owner: DONE was seen; a: 0, or the status code where the lease had ended before. Also: a push has succeeded
	kindJoin      frameKind = 8 // initiator: an operation that was asked for on another connection may use this one too; a: its bytes, about
	kindPush      frameKind = 9 // pusher: body is a push; a: deadline in ms from now; the peer answers with CONFIRMED or FAIL
)

const (
	flagResolve = 1 // request: only the entry is wanted, no bytes
	flagOneLane = 2 // request: everything is to come on the connection that brings it
	flagAll     = 1 // done: every tensor of the cache
)

const (
	headerBytes  = 32
	trailerBytes = 8
	// maxFrame bounds a data frame's payload. Another caller's frame never waits for more: at the speed of loopback less than a
	// millisecond.
	maxFrame = 4 << 20
	// farFrame bounds it where the path may be a wire, on which the wait would be that of a slow pull, and where a device copies the
	// payload, which can't be called off.
	farFrame = 1 << 20
	// maxBody bounds the body of every other frame: what does not fit a control frame is LLM_PARAM_INVALID (spec §14 row 1).
	maxBody = 4 << 20
	// maxCause bounds the text that travels in a FAIL frame.
	maxCause = 512
)

func (h *header) put(b []byte) {
	_ = b[headerBytes-1]
	b[0], b[1], b[2], b[3] = byte(h.kind), h.flags, 0, 0
	binary.LittleEndian.PutUint32(b[4:], h.length)
	binary.LittleEndian.PutUint64(b[8:], h.operation)
	binary.LittleEndian.PutUint64(b[16:], h.a)
	binary.LittleEndian.PutUint64(b[24:], h.b)
}

func parseHeader(b []byte) (h header, err error) {
	h = header{
		kind: frameKind(b[0]), flags: b[1], length: binary.LittleEndian.Uint32(b[4:]), operation: binary.LittleEndian.Uint64(b[8:]),
		a: binary.LittleEndian.Uint64(b[16:]), b: binary.LittleEndian.Uint64(b[24:]),
	}
	limit := uint32(maxBody)
	switch h.kind {
	case kindData:
		limit = maxFrame
		if h.length == 0 {
			return h, protocolError("an empty data frame")
		}
	case kindRequest, kindEntry, kindPush:
	case kindFail:
		limit = maxCause
	case kindCancel, kindDone, kindConfirmed, kindJoin:
		limit = 0
	default:
		return h, protocolError("a frame of an unknown kind")
	}
	if h.length > limit {
		return h, protocolError("a frame that is longer than its kind allows")
	}
	return h, nil
}

// doneHeader says that the tensors have arrived.
func doneHeader(operation uint64, tensors plan.Range) header {
	h := header{kind: kindDone, operation: operation, a: uint64(tensors.First), b: uint64(tensors.Count) | uint64(tensors.Parts)<<32}
	if tensors.All {
		h.flags = flagAll
	}
	return h
}

// tensors is what a DONE says, or a range of nothing.
func (h *header) tensors() plan.Range {
	if h.a > math.MaxUint32 {
		return plan.Range{}
	}
	return plan.Range{First: uint32(h.a), Count: uint32(h.b), Parts: uint32(h.b >> 32), All: h.flags&flagAll != 0}
}

// protocolError is a violation by the peer. It ends the link: after it the stream can't be trusted to be in step.
func protocolError(what string) error {
	return status.New(status.Failed, status.StageTransfer, "the peer sent "+what)
}

// requestFixed is the size of a request's body without its block ids.
const requestFixed = 128

const (
	requestOneSided = 1 << iota
	requestSrcAll
	requestDstAll
	requestExact
	requestLease
)

func requestBytes(req *transport.Request) int {
	return requestFixed + 8*(len(req.Plan.SrcBlocks)+len(req.Plan.DstBlocks))
}

// putRequest writes the body of a request frame.
func putRequest(b []byte, req *transport.Request) {
	p := &req.Plan
	var flags uint8
	if p.OneSided {
		flags |= requestOneSided
	}
	if p.SrcTensors.All {
		flags |= requestSrcAll
	}
	if p.DstTensors.All {
		flags |= requestDstAll
	}
	if p.Exact {
		flags |= requestExact
	}
	if req.Lease {
		flags |= requestLease
	}
	w := writer{b: b}
	w.u64(uint64(req.Key.Kind) | uint64(flags)<<8 | uint64(p.Parts())<<32)
	w.u64(req.Key.ID)
	w.u64(req.Key.Model)
	w.u64(uint64(req.Key.CacheID))
	w.u64(req.Key.Batch)
	w.u32(p.SrcTensors.First)
	w.u32(p.SrcTensors.Count)
	w.u32(p.DstTensors.First)
	w.u32(p.DstTensors.Count)
	w.u64(p.DstBatch)
	w.u64(uint64(p.Size))
	w.u64(p.SrcOffset)
	w.u64(p.DstOffset)
	w.shape(req.Local)
	w.u32(uint32(len(p.SrcBlocks)))
	w.u32(uint32(len(p.DstBlocks)))
	for _, id := range p.SrcBlocks {
		w.u64(id)
	}
	for _, id := range p.DstBlocks {
		w.u64(id)
	}
}

// parseRequest reads the body of a request frame into req, reusing its slices. It never allocates more than the body holds.
func parseRequest(b []byte, req *transport.Request) error {
	if len(b) < requestFixed {
		return protocolError("a request that is too short")
	}
	r := reader{b: b}
	kind := r.u64()
	req.Key = transport.Key{Kind: transport.KeyKind(kind & 0xFF), ID: r.u64(), Model: r.u64(), CacheID: int64(r.u64()), Batch: r.u64()}
	flags := uint8(kind >> 8)
	p := &req.Plan
	p.SrcBatch, p.Whole = 0, false
	p.OneSided, p.Exact, req.Lease = flags&requestOneSided != 0, flags&requestExact != 0, flags&requestLease != 0
	parts := uint32(kind >> 32)
	p.SrcTensors = plan.Range{First: r.u32(), Count: r.u32(), Parts: parts, All: flags&requestSrcAll != 0}
	p.DstTensors = plan.Range{First: r.u32(), Count: r.u32(), Parts: parts, All: flags&requestDstAll != 0}
	p.DstBatch = r.u64()
	p.Size = int64(r.u64())
	p.SrcOffset, p.DstOffset = r.u64(), r.u64()
	req.Local = r.shape()
	src, dst := uint64(r.u32()), uint64(r.u32())
	if (src+dst)*8 != uint64(len(b)-requestFixed) {
		return protocolError("a request whose block lists do not fill it")
	}
	p.SrcBlocks, p.DstBlocks = r.list(p.SrcBlocks, int(src)), r.list(p.DstBlocks, int(dst))
	return nil
}

// pushFixed is the size of what precedes, in a push's body, the addresses and then a request: its key, lists and our shape.
const pushFixed = 40

func pushBodyBytes(p *transport.Push) int {
	return pushFixed + 8*len(p.Addrs) + requestBytes(requestOf(p))
}

func requestOf(p *transport.Push) *transport.Request {
	return &transport.Request{Key: p.Key, Plan: p.Plan, Local: p.Shape}
}

// putPush writes the body of a push frame.
func putPush(b []byte, p *transport.Push) {
	w := writer{b: b}
	w.u64(uint64(p.Source))
	w.u64(p.Generation)
	w.u64(p.Plan.SrcBatch)
	w.u64(p.BlockBytes)
	w.u64(uint64(len(p.Addrs)))
	for _, addr := range p.Addrs {
		w.u64(addr)
	}
	putRequest(w.b, requestOf(p))
}

// parsePush reads the body of a push frame. It never allocates more than the body holds.
func parsePush(b []byte, p *transport.Push) error {
	if len(b) < pushFixed+requestFixed {
		return protocolError("a push that is too short")
	}
	r := reader{b: b}
	source, generation, batch, blockBytes, addrs := int64(r.u64()), r.u64(), r.u64(), r.u64(), r.u64()
	if addrs > uint64(len(r.b)-requestFixed)/8 {
		return protocolError("a push whose addresses do not fit it")
	}
	*p = transport.Push{Source: source, Generation: generation, BlockBytes: blockBytes}
	if addrs > 0 {
		p.Addrs = r.list(nil, int(addrs))
	}
	var req transport.Request
	if err := parseRequest(r.b, &req); err != nil {
		return err
	}
	p.Key, p.Plan, p.Shape = req.Key, req.Plan, req.Local
	p.Plan.SrcBatch = batch
	return nil
}

// entryBytes is the size of an entry's body.
const entryBytes = 80

const (
	entryLeased = 1 << iota
	entryWhole
)

// entry is what the owner says that it resolved.
type entry struct {
	generation uint64
	shape      plan.Shape
	batch      uint64
	leased     bool   // the owner holds a lease, and waits for DONE
	whole      bool   // the source's whole batch row moves
	total      uint64 // bytes that the operation's stream will have
	hash       uint64 // of the owner's plan
	native     int64  // the cache's name in a vendor's library; 0: none
}

func putEntry(b []byte, e *entry) {
	w := writer{b: b}
	w.u64(e.generation)
	w.shape(e.shape)
	w.u64(e.batch)
	var flags uint64
	if e.leased {
		flags |= entryLeased
	}
	if e.whole {
		flags |= entryWhole
	}
	w.u64(flags)
	w.u64(e.total)
	w.u64(e.hash)
	w.u64(uint64(e.native))
}

func parseEntry(b []byte) (e entry, err error) {
	if len(b) != entryBytes {
		return e, protocolError("an entry of a wrong size")
	}
	r := reader{b: b}
	e.generation = r.u64()
	e.shape = r.shape()
	e.batch = r.u64()
	flags := r.u64()
	e.leased, e.whole = flags&entryLeased != 0, flags&entryWhole != 0
	e.total = r.u64()
	e.hash = r.u64()
	e.native = int64(r.u64())
	return e, nil
}

// deadlineMillis turns what is left of a deadline into the wire's milliseconds, rounded up, at least 1.
func deadlineMillis(left time.Duration) uint64 {
	if left <= 0 {
		return 1
	}
	return uint64((left + time.Millisecond - 1) / time.Millisecond)
}

// deadlineFrom is the owner's reading of a wire deadline by its own clock.
func deadlineFrom(now time.Time, millis uint64) time.Time {
	const most = uint64(math.MaxInt64 / int64(time.Millisecond) / 4)
	return now.Add(time.Duration(min(millis, most)) * time.Millisecond)
}

// writer and reader walk a body in order. Bounds are the caller's: a body's size is checked once.
type writer struct{ b []byte }

func (w *writer) u32(v uint32) { binary.LittleEndian.PutUint32(w.b, v); w.b = w.b[4:] }
func (w *writer) u64(v uint64) { binary.LittleEndian.PutUint64(w.b, v); w.b = w.b[8:] }

func (w *writer) shape(s plan.Shape) {
	w.u32(uint32(s.Kind))
	w.u32(s.Tensors)
	w.u64(s.TensorBytes)
	w.u64(s.Stride)
	w.u64(s.Count)
}

type reader struct{ b []byte }

func (r *reader) u32() uint32 { v := binary.LittleEndian.Uint32(r.b); r.b = r.b[4:]; return v }
func (r *reader) u64() uint64 { v := binary.LittleEndian.Uint64(r.b); r.b = r.b[8:]; return v }

func (r *reader) shape() plan.Shape {
	return plan.Shape{Kind: plan.Kind(r.u32()), Tensors: r.u32(), TensorBytes: r.u64(), Stride: r.u64(), Count: r.u64()}
}

func (r *reader) list(into []uint64, count int) []uint64 {
	into = slices.Grow(into[:0], count)
	for range count {
		into = append(into, r.u64())
	}
	return into
}
