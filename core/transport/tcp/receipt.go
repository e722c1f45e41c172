// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"context"
	"errors"
	"math/bits"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// receipt is a push of the peer's, which our engine carries out on a goroutine of its own.
type receipt struct {
	session *Session
	id      uint64
	lane    *lane // the push's; the answer goes there too
	pieces  int   // what it counts for among session.segments
	cancel  context.CancelCauseFunc
}

// errGivenUp is why a receipt ends with CANCEL.
var errGivenUp = errors.New("the pusher has given up")

// pushed serves a PUSH frame.
func (s *Session) pushed(l *lane, h header, body []byte) error {
	what := new(transport.Push)
	if err := parsePush(body, what); err != nil {
		return err
	}
	if s.cfg.Receiver == nil {
		s.refuse(l, h.operation, status.New(status.FeatureNotEnabled, status.StageCheck, "this end takes no pushes"))
		return nil
	}
	r := &receipt{session: s, id: h.operation, lane: l, pieces: piecesOf(what)}
	var ctx context.Context
	ctx, r.cancel = context.WithCancelCause(context.Background())
	err := s.admitReceipt(r)
	if err == nil {
		go r.run(ctx, deadlineFrom(time.Now(), h.a), what)
		return nil
	}
	r.cancel(nil)
	if status.CodeOf(err) == status.LinkBusy {
		s.refuse(l, h.operation, status.From(err, status.StageCheck))
		return nil
	}
	return err
}

// admitReceipt counts the operation and its goroutine, or refuses it where the peer has too much open (LinkBusy).
func (s *Session) admitReceipt(r *receipt) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.cause != nil:
		return s.cause
	case s.serves[r.id] != nil || s.receipts[r.id] != nil:
		return protocolError("two requests of one number")
	case s.full(r.pieces):
		return s.busy()
	}
	s.segments += r.pieces
	s.receipts[r.id] = r
	s.open.Add(1)
	s.workers.Add(1) // the session has not ended, so its lanes' goroutines still count
	return nil
}

// piecesOf bounds what a push takes: neither its lists nor the plan of its pull, which has as many tensors as the push says, are longer.
func piecesOf(what *transport.Push) int {
	over, pieces := bits.Mul64(what.Plan.SrcTensors.Tensors(what.Shape), uint64(max(1, len(what.Plan.DstBlocks))))
	if over != 0 || pieces > plan.MaxSegments {
		return plan.MaxSegments
	}
	return max(int(pieces), len(what.Plan.SrcBlocks), len(what.Plan.DstBlocks), len(what.Addrs))
}

func (r *receipt) run(ctx context.Context, deadline time.Time, what *transport.Push) {
	s := r.session
	defer s.workers.Done()
	ctx, stop := context.WithDeadline(ctx, deadline)
	err := s.cfg.Receiver.Receive(ctx, what)
	stop()
	r.cancel(nil)
	if err != nil {
		s.refuse(r.lane, r.id, status.From(err, status.StageTransfer))
	} else {
		s.tell(r.lane, header{kind: kindConfirmed, operation: r.id})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.receipts, r.id)
	s.segments -= r.pieces
	s.open.Add(-1)
	s.wakeIdle()
}
