// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/testkit"
)

// allBlocks are the numbers of all blocks.
func allBlocks() (out []uint64) {
	for b := range uint64(ownerBlocks) {
		out = append(out, b)
	}
	return out
}

func TestTwoProcessesShareMemory(t *testing.T) {
	for _, transport := range []string{"shm", "tcp"} {
		t.Run(transport, func(t *testing.T) {
			check(t)
			o := startOwner(t, "auto")
			p := o.puller(transport, time.Minute)
			for model := range uint64(2) {
				clear(p.buffer.Bytes())
				require.NoError(t, p.pull(p.call(model, allBlocks(), allBlocks()), patient))
				for b := range ownerBlocks {
					p.requireBlock(model, b, b)
				}
				require.NoError(t, p.pull(p.call(model, []uint64{3, 500, 3}, []uint64{9, 8, 7}), patient))
				p.requireBlock(model, 3, 9)
				p.requireBlock(model, 500, 8)
				p.requireBlock(model, 3, 7)
			}
			require.Contains(t, p.Explain(ownerCluster), "transport: "+transport)
			p.close()
			o.leave()
		})
	}
}

func TestStoppedOwnerTakesNoPartInAPull(t *testing.T) {
	check(t)
	o := startOwner(t, "auto")
	p := o.puller("shm", time.Minute)
	call := [2]*PullCall{p.call(0, []uint64{5}, []uint64{6}), p.call(1, []uint64{5}, []uint64{6})}
	for model := range call {
		require.NoError(t, p.pull(call[model], patient)) // from here on the link knows what the keys mean
	}
	o.stop()
	for model := range call {
		clear(p.buffer.Bytes())
		require.NoError(t, p.pull(call[model], patient))
		p.requireBlock(uint64(model), 5, 6)
	}
	ends := time.Now().Add(200 * time.Millisecond)
	err := p.pull(p.call(7, []uint64{5}, []uint64{6}), time.Until(ends)) // only the owner knows that there is no such key
	require.Equal(t, status.Timeout, status.CodeOf(err))
	o.resume()
	require.Equal(t, status.CacheNotExist, status.CodeOf(p.pull(p.call(7, []uint64{5}, []uint64{6}), patient)))
	p.close()
	o.leave()
}

func TestNothingIsReadOfADeadOwner(t *testing.T) {
	check(t)
	for range 5 {
		o := startOwner(t, "auto")
		p := o.puller("shm", time.Minute)
		calls := [2]*PullCall{p.call(0, []uint64{5}, []uint64{6}), p.call(1, []uint64{5}, []uint64{6})}
		for _, call := range calls {
			require.NoError(t, p.pull(call, patient))
		}
		o.kill()
		for _, call := range calls { // at once: the sockets may not have told yet
			code := status.CodeOf(p.pull(call, patient))
			require.Contains(t, []status.Code{status.Failed, status.NotYetLink}, code)
		}
		successor := startOwner(t, "auto")
		require.Eventually(t, func() bool { return status.CodeOf(p.pull(calls[0], patient)) == status.NotYetLink }, patient, time.Millisecond)
		require.NoError(t, p.link(successor.address))
		require.NoError(t, p.pull(calls[0], patient))
		p.close()
		successor.leave()
	}
}

func TestDeathInTheMiddleOfACopy(t *testing.T) {
	check(t)
	for model := range uint64(2) {
		o := startOwner(t, "auto")
		p := o.puller("shm", time.Minute)
		call := p.call(model, allBlocks(), allBlocks())
		require.NoError(t, p.pull(call, patient))
		results := make(chan error, 1)
		started := make(chan struct{})
		go func() {
			close(started)
			for {
				if err := p.pull(call, patient); err != nil {
					results <- err
					return
				}
			}
		}()
		<-started
		o.kill()
		require.Contains(t, []status.Code{status.Failed, status.NotYetLink}, status.CodeOf(<-results))
		p.close()
	}
}

func TestACacheThatGoesDuringPullsGivesNoWrongBytes(t *testing.T) {
	check(t)
	for range 10 {
		o := startOwner(t, "auto")
		p := o.puller("shm", time.Minute)
		call := p.call(0, allBlocks(), allBlocks())
		require.NoError(t, p.pull(call, patient))
		dropped := make(chan struct{})
		go func() {
			defer close(dropped)
			o.tell("drop")
		}()
		var err error
		for err == nil {
			clear(p.buffer.Bytes())
			if err = p.pull(call, patient); err == nil {
				for _, b := range []int{0, 1, ownerBlocks / 2, ownerBlocks - 1} {
					p.requireBlock(0, b, b)
				}
			}
		}
		require.Equal(t, status.CacheNotExist, status.CodeOf(err))
		<-dropped
		p.close()
		o.leave()
	}
}

func TestCancelledCopiesTouchNothingAfterwards(t *testing.T) {
	check(t)
	o := startOwner(t, "auto")
	p := o.puller("shm", time.Minute)
	for model := range uint64(2) {
		call := p.call(model, allBlocks(), allBlocks())
		require.NoError(t, p.pull(call, patient))
		for _, timeout := range []time.Duration{1, 100 * time.Microsecond, time.Millisecond} {
			clear(p.buffer.Bytes())
			err := p.pull(call, timeout)
			after := append([]byte(nil), p.buffer.Bytes()...)
			if err != nil {
				require.Equal(t, status.Timeout, status.CodeOf(err))
			}
			require.NoError(t, p.pull(p.call(model, []uint64{1}, []uint64{0}), patient)) // something that runs meanwhile
			require.Equal(t, after[ownerBlock:ownerBlocks*ownerBlock], p.buffer.Bytes()[ownerBlock:ownerBlocks*ownerBlock])
		}
	}
	p.close()
	o.leave()
}

// tinyPull returns a pull of one block of one tensor, as PullStart makes it.
func tinyPull(t testing.TB, p *pulling, model uint64) func() {
	call := p.call(model, []uint64{5}, []uint64{6})
	call.Plan.SrcTensors.All, call.Plan.DstTensors.All = false, false
	call.Plan.SrcTensors.Count, call.Plan.DstTensors.Count, call.TensorsPerLayer = 1, 1, 1
	require.NoError(t, p.pull(call, patient))
	return func() {
		started, err := p.BeginPull(time.Now().Add(time.Minute), call)
		if err == nil && !started.Advance(time.Second) {
			panic("the pull was not made at once")
		}
		if err == nil {
			err = started.Finish(context.Background())
		}
		if err != nil {
			panic(err)
		}
	}
}

func TestTinyPullAllocatesNothing(t *testing.T) {
	if testkit.Raced {
		t.Skip("counts allocations")
	}
	check(t)
	o := startOwner(t, "auto")
	p := o.puller("shm", time.Minute)
	for model := range uint64(2) {
		require.Zero(t, testing.AllocsPerRun(200, tinyPull(t, p, model)), "model %d", model)
	}
	large := p.call(0, allBlocks(), allBlocks())
	require.NoError(t, p.pull(large, patient))
	require.Zero(t, testing.AllocsPerRun(20, func() {
		started, err := p.BeginPull(time.Now().Add(time.Minute), large)
		if err != nil || !started.Advance(time.Second) || started.Finish(context.Background()) != nil {
			panic("the pull was not made at once")
		}
	}))
	p.close()
	o.leave()
}

// BenchmarkPullTiny is W3 of docs/performance.md as a call of the engine: one block of 16 KiB.
func BenchmarkPullTiny(b *testing.B) {
	for model, name := range []string{"pool", "private"} {
		b.Run(name, func(b *testing.B) {
			o := startOwner(b, "auto")
			p := o.puller("shm", time.Minute)
			pull := tinyPull(b, p, uint64(model))
			b.SetBytes(ownerBlock)
			for b.Loop() {
				pull()
			}
			p.close()
			o.leave()
		})
	}
}

// BenchmarkCopyTiny is what the same bytes cost without any of it.
func BenchmarkCopyTiny(b *testing.B) {
	from, err := mem.NewBuffer(ownerBlock)
	require.NoError(b, err)
	to, err := mem.NewBuffer(ownerBlock)
	require.NoError(b, err)
	b.SetBytes(ownerBlock)
	for b.Loop() {
		copy(to.Bytes(), from.Bytes())
	}
	require.NoError(b, from.Free())
	require.NoError(b, to.Free())
}
