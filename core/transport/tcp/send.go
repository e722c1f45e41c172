// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"errors"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// errWouldBlock ends a pump that must not wait.
var errWouldBlock = errors.New("the connection takes no more bytes now")

// sending is the frame that a lane is in the middle of: a control frame, or a chunk of a served operation. It lies as
//
//	entry frame (first chunk of the operation on this lane) | header | payload | trailer
//
// and sent says how far it has gone. A chunk whose operation ends in mid-frame is spoiled: the lane lets go of the operation at once,
// however long the peer takes to read, the rest of the payload comes from scratch, and the trailer says so.
type sending struct {
	stopped bool // the session is ending: nothing is sent any more
	sent    uint64
	control frame

	chunk          bool   // a chunk is under way
	serve          *serve // its operation; nil: it is spoiled
	offset, length uint64 // the chunk, in the operation's stream
	entry          uint64 // bytes of the entry frame, 0 where it has gone before
	copied         bool   // the payload lies in stage
	active
	stint mem.Stint
}

// answers reports that such a frame is said because of a frame of the peer's.
func (k frameKind) answers() bool { return k == kindEntry || k == kindFail || k == kindConfirmed }

// unread is how many answers wait until the peer reads.
func (l *lane) unread() int {
	l.queueMu.Lock()
	defer l.queueMu.Unlock()
	return l.answers
}

// withdraw takes a request or a push back that has not begun to go out, and reports whether it could. Callers that time out on a peer which does
// not read would otherwise leave a request and a CANCEL behind each.
func (l *lane) withdraw(operation uint64) bool {
	l.queueMu.Lock()
	i := slices.IndexFunc(l.queue, func(f frame) bool { return (f.kind == kindRequest || f.kind == kindPush) && f.operation == operation })
	if i < 0 {
		l.queueMu.Unlock()
		return false
	}
	buffer := l.queue[i].buffer
	l.queue = slices.Delete(l.queue, i, i+1)
	l.queueMu.Unlock()
	l.session.putBuffer(buffer)
	return true
}

// enqueue hands a control frame to the lane and sends it at once where nobody is sending.
func (l *lane) enqueue(f frame) {
	l.queueMu.Lock()
	if l.released {
		l.queueMu.Unlock()
		_ = f.buffer.Free() // see Session.Close
		return
	}
	l.queue = append(l.queue, f)
	if f.kind.answers() {
		l.answers++
	}
	l.queueMu.Unlock()
	l.push()
}

// push drives the sending side without waiting, or wakes the goroutine that does.
func (l *lane) push() {
	if !l.sendMu.TryLock() {
		l.rouse()
		return
	}
	err := l.pump(false)
	l.sendMu.Unlock()
	switch {
	case err == nil:
		// Whoever queued a frame while we held the lock found it taken and roused the sender: nothing is lost.
	case errors.Is(err, errWouldBlock):
		l.rouse()
	default:
		l.session.broke(err)
	}
}

// poke has what there is to send sent: by whoever polls the lane, or by the goroutine that sends.
func (l *lane) poke() {
	if l.poked.Store(true); !l.polling.Load() && l.poked.Swap(false) {
		l.rouse()
	}
}

func (l *lane) rouse() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

func (l *lane) sendLoop() {
	defer l.session.workers.Done()
	defer l.stopSending()
	for {
		select {
		case <-l.wake:
		case <-l.session.closing:
			return
		}
		l.seat.take(&l.tx.stint) // which is this goroutine's alone
		l.sendMu.Lock()
		err := l.pump(true)
		l.sendMu.Unlock()
		l.tx.stint.Leave()
		if err != nil {
			l.session.broke(err)
			return
		}
	}
}

// stopSending lets go of the operation whose frame was under way.
func (l *lane) stopSending() {
	l.sendMu.Lock()
	defer l.sendMu.Unlock()
	l.tx.drop()
	l.tx.rest()
	if f := l.tx.control; f.buffer != nil {
		l.tx.control = frame{}
		_ = f.buffer.Free() // see Session.Close
	}
	l.tx.stopped = true
}

// pushBytes bounds what push sends: it runs on goroutines that have something else to do, such as receiving, or a caller's deadline.
const pushBytes = 2 << 20

// pump sends what there is: control frames first, then a chunk of each operation in turn. The caller holds sendMu.
// Without block it ends with errWouldBlock where the connection takes no more, or has taken enough.
func (l *lane) pump(block bool) error {
	for pushed := 0; ; {
		if l.tx.stopped || (!l.tx.busy() && !l.nextFrame()) {
			l.tx.rest()
			return nil
		}
		n, err := l.sendPart(block)
		switch {
		case errors.Is(err, unix.EFAULT) && l.tx.serve != nil:
			l.tx.serve.fail(status.New(status.ParamInvalid, status.StageTransfer, "the owner's registered memory is not mapped any more").
				Hinting("keep registered memory mapped until unregister_cache has returned"))
		case err != nil:
			return err
		case block:
			l.tx.stint.GiveWay()
		default:
			if pushed += n; n == 0 || pushed >= pushBytes {
				return errWouldBlock
			}
		}
	}
}

func (tx *sending) busy() bool { return tx.control.buffer != nil || tx.chunk }

// nextFrame picks what to send next and reports whether there is anything.
func (l *lane) nextFrame() bool {
	tx := &l.tx
	l.queueMu.Lock()
	if len(l.queue) > 0 {
		tx.control, tx.sent = l.queue[0], 0
		if tx.control.kind.answers() {
			l.answers--
		}
		l.queue = slices.Delete(l.queue, 0, 1)
		l.queueMu.Unlock()
		return true
	}
	l.queueMu.Unlock()
	chunk, ok := l.session.claim(l)
	if !ok {
		return false
	}
	tx.chunk, tx.serve, tx.offset, tx.length, tx.sent = true, chunk.serve, chunk.offset, chunk.length, 0
	tx.entry, tx.copied = 0, false
	if chunk.first {
		tx.entry = uint64(copy(l.fixed.Bytes()[txEntryAt:], chunk.serve.entry[:]))
	}
	h := header{kind: kindData, length: uint32(chunk.length), operation: chunk.serve.id, a: chunk.offset}
	h.put(l.fixed.Bytes()[txHeaderAt:])
	return true
}

// sendPart makes one system call for the frame under way and returns how many bytes it took.
func (l *lane) sendPart(block bool) (n int, err error) {
	if l.tx.control.buffer != nil {
		return l.sendControl(block)
	}
	return l.sendChunk(block)
}

func (l *lane) sendControl(block bool) (int, error) {
	tx := &l.tx
	f := tx.control
	spans := [1]mem.Span{{Addr: f.buffer.Addr() + uintptr(tx.sent), Bytes: uint64(f.bytes) - tx.sent}}
	n, err := l.give(spans[:], block)
	tx.sent += uint64(n)
	if tx.sent == uint64(f.bytes) {
		tx.control = frame{}
		l.session.putBuffer(f.buffer)
	}
	return n, err
}

func (l *lane) sendChunk(block bool) (int, error) {
	tx := &l.tx
	source := tx.acquire()
	if source == nil {
		tx.drop()
		if tx.sent == 0 {
			tx.chunk = false // nothing of it has gone out: there is nothing to complete
			return 0, nil
		}
	}
	spans, err := l.chunkSpans()
	n := 0
	if err == nil {
		n, err = l.give(spans, block)
	}
	if source != nil {
		source.Release()
	}
	if tx.sent += uint64(n); tx.sent == tx.entry+headerBytes+tx.length+trailerBytes {
		tx.chunk = false
		tx.drop()
	}
	return n, err
}

// acquire takes hold of the source for one system call. It returns nil where the operation has ended.
func (tx *sending) acquire() transport.Source {
	v := tx.serve
	if v == nil || v.stopped() {
		return nil
	}
	if !v.source.Acquire() {
		v.fail(status.New(status.CacheNotExist, status.StageTransfer, "the cache was withdrawn during the transfer"))
		return nil
	}
	if v.stream.device != nil && !tx.copied {
		if err := tx.fetch(); err != nil {
			v.source.Release()
			v.fail(copyFailed("from the owner's memory", err))
			return nil
		}
	}
	return v.source
}

// fetch copies the chunk from the device where it lies.
func (tx *sending) fetch() error {
	stage, err := tx.staged()
	if err != nil {
		return err
	}
	tx.copied = true
	return tx.carry(tx.serve.stream, stage, tx.offset, tx.length)
}

// chunkSpans names the memory of what is left of the chunk's frame, as far as one system call takes it.
func (l *lane) chunkSpans() ([]mem.Span, error) {
	tx := &l.tx
	spans := tx.spans()
	at := tx.sent
	if at < tx.entry {
		spans = append(spans, l.span(txEntryAt+int(at), int(tx.entry-at)))
		at = tx.entry
	}
	if at -= tx.entry; at < headerBytes {
		spans = append(spans, l.span(txHeaderAt+int(at), headerBytes-int(at)))
		at = headerBytes
	}
	const framing = 3 // entry, header and trailer
	if at -= headerBytes; at < tx.length {
		var covered uint64
		var err error
		switch {
		case tx.serve == nil:
			spans, covered, err = tx.waste(spans, tx.length-at)
		case tx.copied:
			covered = tx.length - at
			spans = append(spans, mem.Span{Addr: tx.stage.Addr() + uintptr(at), Bytes: covered})
		default:
			spans, covered = tx.serve.stream.spans(spans, mem.MaxSpans-framing, tx.offset+at, tx.length-at)
		}
		if at += covered; err != nil || at < tx.length {
			return spans, err
		}
	}
	if at == tx.length {
		w := writer{b: l.fixed.Bytes()[txTrailerAt:]}
		w.u64(tx.verdict())
	}
	at -= tx.length
	return append(spans, l.span(txTrailerAt+int(at), trailerBytes-int(at))), nil
}

// verdict is the trailer's value: 0 where every byte of the payload came from the owner's live cache.
func (tx *sending) verdict() uint64 {
	if tx.serve == nil {
		return uint64(status.Failed)
	}
	return 0
}

func (l *lane) give(spans []mem.Span, block bool) (int, error) {
	if block {
		return l.conn.Send(spans)
	}
	return l.conn.TrySend(spans)
}

// drop lets go of the operation whose chunk is under way.
func (tx *sending) drop() {
	if tx.serve != nil {
		v := tx.serve
		tx.serve = nil
		v.session.chunkDone(v)
	}
}
