// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"sort"
	"sync"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
)

// stream is one side's view of an operation's bytes: the plan's segments, in order, as addresses of this side.
type stream struct {
	segments []plan.Segment
	ends     []uint64   // ends[i]: offset in the stream at which segments[i] ends
	addrs    []uintptr  // base of each tensor of this side
	source   bool       // this side is the source
	device   mem.Device // where this side's memory lies, if no system call reaches it; nil: one does
}

// streams recycles what an operation needs for its segments.
var streams = sync.Pool{New: func() any { return new(stream) }}

func newStream(source bool) *stream {
	s := streams.Get().(*stream)
	s.source = source
	return s
}

// keepSegments bounds what the pool keeps of a stream: 2.5 MiB. A larger one is rare and goes to the garbage collector.
const keepSegments = 1 << 16

// recycle gives the stream back. Nobody may use it after.
func (s *stream) recycle() {
	if cap(s.segments) > keepSegments {
		return
	}
	s.segments, s.ends, s.addrs, s.device = s.segments[:0], s.ends[:0], s.addrs[:0], nil
	streams.Put(s)
}

// index fills ends from segments and returns the bytes of the whole stream.
func (s *stream) index() uint64 {
	s.ends = s.ends[:0]
	var total uint64
	for i := range s.segments {
		total += s.segments[i].Bytes
		s.ends = append(s.ends, total)
	}
	return total
}

func (s *stream) addr(g *plan.Segment) uintptr {
	if s.source {
		return s.addrs[g.SrcTensor] + uintptr(g.SrcOffset)
	}
	return s.addrs[g.DstTensor] + uintptr(g.DstOffset)
}

// spans appends the memory of stream bytes [offset, offset+bytes) to into, at most most spans, neighbours merged, and returns how many
// bytes they cover.
func (s *stream) spans(into []mem.Span, most int, offset, bytes uint64) ([]mem.Span, uint64) {
	i := sort.Search(len(s.ends), func(i int) bool { return s.ends[i] > offset })
	first := len(into)
	var covered uint64
	for ; i < len(s.segments) && covered < bytes; i++ {
		g := &s.segments[i]
		skip := offset + covered - (s.ends[i] - g.Bytes)
		run := mem.Span{Addr: s.addr(g) + uintptr(skip), Bytes: min(g.Bytes-skip, bytes-covered)}
		if n := len(into); n > first && into[n-1].Addr+uintptr(into[n-1].Bytes) == run.Addr {
			into[n-1].Bytes += run.Bytes
		} else if n-first == most {
			break
		} else {
			into = append(into, run)
		}
		covered += run.Bytes
	}
	return into, covered
}
