// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// HoldTarget holds the cache that a peer's push names, into a Use of the caller's, new or released. Names mean what they mean to Open,
// but nothing is consumed and the batch row is the caller's to check. What is not there is status.CacheNotExist; a cache that one-sided
// mode may not touch is status.ParamInvalid.
func (t *Table) HoldTarget(l Lookup, u *Use) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return tableClosed()
	}
	var s Source
	if err := t.resolve(l, &s); err != nil {
		return err
	}
	if l.OneSided && !s.entry.Accessible {
		return inaccessible(s.entry)
	}
	if s.entry.detained.Load() > 0 {
		return detained(s.entry, status.StageLookup)
	}
	t.hold(s.entry, u)
	return nil
}

// Uses are holds that end together.
type Uses []*Use

// HoldSpans holds, until Release, the caches in which raw addresses lie that a peer pushes to: each span wholly inside one tensor of one
// live cache, which one-sided mode also has to allow, and all on a device or none, else it is status.ParamInvalid and nothing is held. It ends
// when ctx ends: each address is looked for in the whole table.
func (t *Table) HoldSpans(ctx context.Context, spans []mem.Span, oneSided bool) (Uses, error) {
	var held Uses
	for _, span := range spans {
		// Neighbours mostly are tensors of one cache.
		if n := len(held); n > 0 && held[n-1].entry.contains(span) {
			continue
		}
		if ctx.Err() != nil {
			held.Release()
			return nil, context.Cause(ctx)
		}
		use, err := t.holdSpan(span, oneSided)
		if err != nil {
			held.Release()
			return nil, err
		}
		if held = append(held, use); t.onDevice(use.entry) != t.onDevice(held[0].entry) {
			held.Release()
			return nil, invalid("the addresses lie partly on a device and partly in host memory").Hinting("push them in two calls")
		}
	}
	return held, nil
}

// holdSpan looks through all caches, and lets others at the table between two spans.
func (t *Table) holdSpan(span mem.Span, oneSided bool) (*Use, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, tableClosed()
	}
	var refused error
	for _, e := range t.live {
		switch {
		case !e.contains(span):
		case oneSided && !e.Accessible:
			refused = inaccessible(e)
		case e.detained.Load() > 0:
			refused = detained(e, status.StageLookup)
		default:
			use := new(Use)
			t.hold(e, use)
			return use, nil
		}
	}
	if refused != nil {
		return nil, refused
	}
	return nil, status.Newf(status.ParamInvalid, status.StageLookup,
		"%d bytes at address %#x are not wholly inside a tensor of a live cache", span.Bytes, span.Addr).
		Hinting("register the memory there before it is pushed to")
}

// contains says whether the span lies in one of the tensors.
func (e *Entry) contains(span mem.Span) bool {
	if e.wraps || span.Bytes > e.Shape.TensorBytes {
		return false
	}
	for _, addr := range e.Addrs {
		if span.Addr >= addr && uint64(span.Addr-addr) <= e.Shape.TensorBytes-span.Bytes {
			return true
		}
	}
	return false
}

// Backing is [Use.Backing] of all of them: the most careful one.
func (held Uses) Backing() (mem.Backing, error) {
	careful := mem.BackingNone
	for _, use := range held {
		backing, err := use.Backing()
		if err != nil {
			return mem.BackingNone, err
		}
		careful = max(careful, backing)
	}
	return careful, nil
}

// Within returns a context that ends with ctx, and as soon as one of the caches is unregistered, whose owner is not to wait for as long
// as a peer may take. The caller calls what comes with it.
func (held Uses) Within(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	var watches []func() bool
	for _, use := range held {
		watches = append(watches, context.AfterFunc(use.entry.life, func() { cancel(errWithdrawn) }))
	}
	return ctx, func() {
		for _, stop := range watches {
			stop()
		}
		cancel(nil)
	}
}

var errWithdrawn = status.New(status.CacheNotExist, status.StageTransfer, "the cache was withdrawn during the transfer")

// Release ends all holds. Releasing twice is fine.
func (held Uses) Release() {
	for _, use := range held {
		use.Release()
	}
}
