// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// entryFrame is a good entry for a pull of one row.
func entryFrame(operation uint64, dst *cache) []byte {
	req := rows(1, dst)
	segments, _ := plan.Build(&req.Plan, dst.shape, dst.shape, nil)
	body := make([]byte, entryBytes)
	putEntry(body, &entry{shape: dst.shape, total: plan.Total(segments), hash: plan.Hash(&req.Plan, segments)})
	return frameOf(header{kind: kindEntry, operation: operation}, body)
}

func TestABrokenProtocolEndsTheSessionWithItsCause(t *testing.T) {
	oversized := func(kind frameKind, length uint32) []byte {
		b := make([]byte, headerBytes)
		(&header{kind: kind, length: length, operation: 1}).put(b)
		return b
	}
	request := func(dst *cache) []byte {
		body := make([]byte, requestBytes(rows(1, dst)))
		putRequest(body, rows(1, dst))
		return body
	}
	for name, c := range map[string]struct {
		bytes func(dst *cache) []byte // sent while the pull with the number 1 is under way
		cause string
	}{
		"unknown kind":               {func(*cache) []byte { return oversized(99, 0) }, "unknown kind"},
		"zeros":                      {func(*cache) []byte { return make([]byte, 100) }, "unknown kind"},
		"huge data":                  {func(*cache) []byte { return oversized(kindData, maxFrame+1) }, "longer than its kind"},
		"empty data":                 {func(*cache) []byte { return oversized(kindData, 0) }, "empty data"},
		"huge request":               {func(*cache) []byte { return oversized(kindRequest, 1<<32-1) }, "longer than its kind"},
		"long cancel":                {func(*cache) []byte { return oversized(kindCancel, 1) }, "longer than its kind"},
		"long fail":                  {func(*cache) []byte { return oversized(kindFail, maxCause+1) }, "longer than its kind"},
		"short request":              {func(*cache) []byte { return frameOf(header{kind: kindRequest}, make([]byte, 20)) }, "too short"},
		"lists that lie":             {func(*cache) []byte { return frameOf(header{kind: kindRequest}, lists(1<<32-1, 1<<32-1)) }, "do not fill it"},
		"short entry":                {func(*cache) []byte { return frameOf(header{kind: kindEntry, operation: 1}, make([]byte, 71)) }, "entry of a wrong size"},
		"an entry without the lease": {func(dst *cache) []byte { return entryFrame(1, dst) }, "without the lease that was asked for"},
		"data unasked":               {func(*cache) []byte { return dataFrame(1, 0, make([]byte, 10), 0) }, "data before its entry"},
		"data beyond":                {func(dst *cache) []byte { return append(entryFrame(1, dst), dataFrame(1, 99_999, []byte{1, 2}, 0)...) }, "beyond the end"},
		"data far beyond":            {func(dst *cache) []byte { return append(entryFrame(1, dst), dataFrame(1, 1<<64-1, []byte{1, 2}, 0)...) }, "beyond the end"},
		"same request twice": {func(dst *cache) []byte {
			f := frameOf(header{kind: kindRequest, operation: 5, a: 1000}, request(dst))
			return append(f, f...)
		}, "two requests of one number"},
		"done of what is no lease": {func(dst *cache) []byte {
			f := frameOf(header{kind: kindRequest, operation: 5, a: 1000}, request(dst))
			return append(f, frameOf(header{kind: kindDone, flags: flagAll, operation: 5}, nil)...)
		}, "a DONE for what it has not asked for"},
		"done of too many tensors": {func(dst *cache) []byte {
			f := frameOf(header{kind: kindRequest, operation: 5, a: 1000}, lists(0, 0)) // resolves nothing, is refused
			f = append(f, frameOf(header{kind: kindRequest, flags: flagResolve, operation: 6, a: 1000}, leased(request(dst)))...)
			return append(f, frameOf(header{kind: kindDone, operation: 6, a: 1, b: 1<<64 - 1}, nil)...)
		}, "a DONE for what it has not asked for"},
		"huge push":          {func(*cache) []byte { return oversized(kindPush, maxBody+1) }, "longer than its kind"},
		"short push":         {func(*cache) []byte { return frameOf(header{kind: kindPush}, make([]byte, pushFixed+requestFixed-1)) }, "a push that is too short"},
		"addresses that lie": {func(*cache) []byte { return frameOf(header{kind: kindPush}, pushLists(1<<61, 0)) }, "do not fit it"},
		"a push's lists lie": {func(*cache) []byte { return frameOf(header{kind: kindPush}, pushLists(0, 1<<32-1)) }, "do not fill it"},
		"same push twice": {func(*cache) []byte {
			return append(pushFrame(5, fullPush()), pushFrame(5, fullPush())...)
		}, "two requests of one number"},
		"a request of a push's number": {func(dst *cache) []byte {
			return append(pushFrame(5, fullPush()), frameOf(header{kind: kindRequest, operation: 5, a: 1000}, request(dst))...)
		}, "two requests of one number"},
		"half a header and the end": {func(*cache) []byte { return make([]byte, 10) }, "closed the connection"},
	} {
		t.Run(name, func(t *testing.T) {
			check(t)
			a, b := loopbackConns(t, 1)
			raw, o := newRaw(t, b[0]), newOwner(t)
			s, broken := newSession(t, a, o)
			dst := newCache(t, plan.Contiguous, 1, 1, 100_000)
			big := newCache(t, plan.Contiguous, 1, 1, 100_000)
			held := make(chan struct{})
			letGo := sync.OnceFunc(func() { close(held) })
			t.Cleanup(letGo)
			o.offer(1, &offer{cache: big, acquire: func(*source, int64) bool { <-held; return true }})
			o.offer(2, &offer{cache: big, consumes: true})
			o.takes(untilTheEnd)
			req := rows(1, dst)
			req.Lease = name == "an entry without the lease"
			result := pulling(s, context.Background(), req, dst)
			raw.expect(kindRequest, 1)
			if name == "same request twice" || name == "done of what is no lease" {
				// The lane's receiver sends the first answer itself where nobody else does: keep the sender busy with it.
				s.lanes[0].sendMu.Lock()
				raw.write(c.bytes(dst))
				requireStatus(t, receiveFrom(t, broken), status.Failed, c.cause)
				s.lanes[0].sendMu.Unlock()
			} else {
				raw.write(c.bytes(dst))
				if name == "half a header and the end" {
					raw.conn.Shutdown()
				}
				requireStatus(t, receiveFrom(t, broken), status.Failed, c.cause)
			}
			letGo()
			requireStatus(t, receiveFrom(t, result), status.Failed, c.cause)
		})
	}
}

// lists is a request's body with counts that need not be true.
func lists(src, dst uint32) []byte {
	b := make([]byte, requestFixed)
	binary.LittleEndian.PutUint32(b[requestFixed-8:], src)
	binary.LittleEndian.PutUint32(b[requestFixed-4:], dst)
	return b
}

// pushLists is a push's body with counts that need not be true.
func pushLists(addrs uint64, src uint32) []byte {
	b := append(make([]byte, pushFixed), lists(src, 0)...)
	binary.LittleEndian.PutUint64(b[pushFixed-8:], addrs)
	return b
}

// leased turns a request's body into one for the cache with the id 2.
func leased(body []byte) []byte {
	binary.LittleEndian.PutUint64(body[8:], 2)
	return body
}

func TestGarbageNeverDoesMoreThanBreakTheSession(t *testing.T) {
	check(t)
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 4))
		raw, o, s, broken := newStranger(t, seed)
		o.offer(1, &offer{cache: newCache(t, plan.Contiguous, 1, 1, 1000), consumes: seed%2 == 0})
		var junk []byte
		for range 30 {
			body := make([]byte, r.IntN(200))
			for i := range body {
				body[i] = byte(r.Uint32())
			}
			kind := frameKind(r.IntN(10))
			junk = append(junk, frameOf(header{kind: kind, flags: uint8(r.IntN(3)), operation: uint64(r.IntN(3)), a: uint64(r.IntN(3))}, body)...)
		}
		raw.write(junk)
		raw.conn.Shutdown()
		receiveFrom(t, broken)
		s.Close(errClosed)
	}
}

func TestAPeerHasABoundedNumberOfOperations(t *testing.T) {
	check(t)
	raw, o, s, _ := newStranger(t, 1)
	c := newCache(t, plan.Contiguous, 1, 1, 10)
	o.offer(1, &offer{cache: c, consumes: true})
	for id := range uint64(maxOperations) {
		raw.request(id, flagResolve, time.Hour, rows(1, c))
		raw.expect(kindEntry, id)
	}
	raw.request(maxOperations, flagResolve, time.Hour, rows(1, c))
	h, body := raw.expect(kindFail, maxOperations)
	require.EqualValues(t, status.LinkBusy, h.a)
	require.Contains(t, string(body), "more than the owner serves at once")
	raw.send(header{kind: kindCancel, operation: 17}, nil)
	raw.request(maxOperations, flagResolve, time.Hour, rows(1, c))
	raw.expect(kindEntry, maxOperations)
	s.Close(errClosed)
}

func TestAPeersPlansAreBoundedTogether(t *testing.T) {
	check(t)
	raw, o, s, _ := newStranger(t, 1)
	c := newCache(t, plan.Blocks, 1, 10, 10)
	o.offer(1, &offer{cache: c})
	s.mu.Lock()
	s.segments = maxSegments - 3
	s.mu.Unlock()
	raw.request(1, 0, time.Hour, blocks(1, c, []uint64{1, 3, 5}, []uint64{1, 3, 5}))
	raw.expect(kindEntry, 1)
	raw.expect(kindData, 1)
	raw.request(2, 0, time.Hour, blocks(1, c, []uint64{1, 3, 5, 7}, []uint64{1, 3, 5, 7}))
	h, _ := raw.expect(kindFail, 2)
	require.EqualValues(t, status.LinkBusy, h.a)
	receiveFrom(t, s.Idle())
	s.mu.Lock()
	require.Equal(t, maxSegments-3, s.segments)
	s.segments = 0
	s.mu.Unlock()
}

func TestAPeerThatAsksWithoutReadingIsCutOff(t *testing.T) {
	check(t)
	raw, _, s, broken := newStranger(t, 1)
	c := newCache(t, plan.Contiguous, 1, 1, 10)
	for id := range uint64(4 * maxAnswers) {
		raw.request(id, 0, time.Hour, rows(1, c))
	}
	requireStatus(t, receiveFrom(t, broken), status.Failed, "without reading the answers")
	require.LessOrEqual(t, s.lanes[0].unread(), maxAnswers+1)
}

func TestRefusalOfAStrangerIsReadWithCare(t *testing.T) {
	check(t)
	s, raw, dst := against(t)
	for i, c := range []struct {
		code  uint64
		text  string
		want  status.Code
		stage status.Stage
		cause string
		hint  string
	}{
		{0, "", status.Failed, status.StageTransfer, "the peer has refused", ""},
		{1 << 40, "check\x00x\x00y\x00z", status.Failed, status.StageCheck, "x", "y\x00z"},
		{uint64(status.ParamInvalid), "nowhere\x00\xff\xfe", status.ParamInvalid, status.StageTransfer, "\uFFFD", ""},
		{0x12345678, "lookup", status.Failed, status.StageLookup, "the peer has refused", ""},
	} {
		result := pulling(s, context.Background(), rows(1, dst), dst)
		raw.expect(kindRequest, uint64(i+1))
		raw.send(header{kind: kindFail, operation: uint64(i + 1), a: c.code}, []byte(c.text))
		e := requireStatus(t, receiveFrom(t, result), c.want, c.cause)
		require.Equal(t, c.stage, e.Stage)
		require.Equal(t, c.hint, e.Hint)
	}
}
