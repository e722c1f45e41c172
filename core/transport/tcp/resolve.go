// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"context"

	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

var _ transport.Control = (*Session)(nil)

// Resolve implements transport.Control: the owner answers with an ENTRY alone. Where the pull consumes its key the owner keeps the
// lease until DONE or CANCEL, and the operation stays on our table until then; also where the request asks for it.
func (s *Session) Resolve(ctx context.Context, req *transport.Request) (transport.Resolved, error) {
	if ctx.Err() != nil {
		return transport.Resolved{}, transport.Ended(ctx)
	}
	deadline, _ := ctx.Deadline()
	// Nothing is placed, so no address is looked at.
	p, err := s.start(deadline, req, transport.Local{Addrs: make([]uintptr, req.Local.Tensors)}, flagResolve)
	if err != nil {
		return transport.Resolved{}, err
	}
	if err := s.wait(ctx, p); err != nil {
		s.forget(p, p.id)
		return transport.Resolved{}, err
	}
	r := transport.Resolved{Generation: p.entry.generation, Shape: p.entry.shape, Batch: p.entry.batch, Whole: p.entry.whole,
		Native: p.entry.native}
	if !p.entry.leased {
		s.forget(p, p.id)
		return r, nil
	}
	r.Lease = granted{s, p, p.id, p.lane}
	return r, nil
}

// granted is a resolved pull that the owner holds a lease for.
type granted struct {
	session *Session
	pull    *pull // until the lease was confirmed or abandoned
	id      uint64
	lane    *lane
}

// Confirm implements transport.Lease.
func (l granted) Confirm(ctx context.Context) error {
	defer l.session.forget(l.pull, l.id)
	return l.session.confirm(ctx, l.pull)
}

// Abandon implements transport.Lease.
func (l granted) Abandon() {
	defer l.session.forget(l.pull, l.id)
	l.session.tell(l.lane, header{kind: kindCancel, operation: l.id})
}
