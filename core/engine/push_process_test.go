// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// Pushes between two processes, of which the other one is the owner of owner_test.go.

var processWays = []string{"shm", "tcp"}

// pushBlocks pushes blocks src into blocks dst of a cache of the owner's.
func (p *pulling) pushBlocks(model uint64, src, dst []uint64, timeout time.Duration) error {
	ctx, cancel := within(timeout)
	defer cancel()
	return p.Push(ctx, &PushCall{
		Cluster: ownerCluster, Key: transport.Key{Kind: transport.KeyNormal, ID: cache.NoID, Model: model}, Cache: p.id, TensorsPerLayer: ownerTensors,
		Plan: plan.Request{SrcTensors: everything, DstTensors: everything, SrcBlocks: src, DstBlocks: dst},
	})
}

func overProcesses(t *testing.T, run func(t *testing.T, o *owning, p *pulling)) {
	for _, way := range processWays {
		t.Run(way, func(t *testing.T) {
			check(t)
			o := startOwner(t, "auto")
			run(t, o, o.puller(way, time.Minute))
		})
	}
}

func TestTwoProcessesPushToEachOther(t *testing.T) {
	overProcesses(t, func(t *testing.T, o *owning, p *pulling) {
		for model := range uint64(2) { // into its pool, and into memory of its own
			for to := p.buffer.Bytes(); len(to) > 0; {
				to = to[copy(to, noise()[model:]):]
			}
			want := bytes.Clone(p.buffer.Bytes())
			require.NoError(t, p.pushBlocks(model, allBlocks(), allBlocks(), patient))
			clear(p.buffer.Bytes())
			require.NoError(t, p.pull(p.call(model, allBlocks(), allBlocks()), patient))
			require.True(t, bytes.Equal(want, p.buffer.Bytes()), "model %d", model)
		}
		clear(p.buffer.Bytes())
		require.NoError(t, p.pull(p.call(0, allBlocks(), allBlocks()), patient))
		want := bytes.Clone(p.buffer.Bytes())
		clear(p.buffer.Bytes())
		o.tell("push")
		require.True(t, bytes.Equal(want, p.buffer.Bytes()))
		p.close()
		o.leave()
	})
}

func TestAStoppedProcessDoesNotConfirm(t *testing.T) {
	overProcesses(t, func(t *testing.T, o *owning, p *pulling) {
		require.NoError(t, p.pushBlocks(0, []uint64{1}, []uint64{2}, patient))
		o.stop()
		began := time.Now()
		err := p.pushBlocks(0, []uint64{1}, []uint64{2}, 100*time.Millisecond)
		e := requireCode(t, status.Timeout, err)
		require.Equal(t, "receiver has not confirmed", e.Cause)
		require.GreaterOrEqual(t, time.Since(began), 1100*time.Millisecond)
		later := begin(func() error { return p.pushBlocks(0, []uint64{1}, []uint64{2}, patient) })
		requireCode(t, status.Timeout, p.pull(p.call(0, []uint64{1}, []uint64{2}), 100*time.Millisecond))
		require.False(t, later.ended())
		o.resume()
		require.NoError(t, later.wait())
		require.NoError(t, p.pull(p.call(0, []uint64{1}, []uint64{2}), patient))
		p.close()
		o.leave()
	})
}

func TestTheDeathOfAReceiverEndsPushes(t *testing.T) {
	overProcesses(t, func(t *testing.T, o *owning, p *pulling) {
		require.NoError(t, p.pushBlocks(0, allBlocks(), allBlocks(), patient))
		pushes := begin(func() error {
			for {
				if err := p.pushBlocks(0, allBlocks(), allBlocks(), patient); err != nil {
					return err
				}
			}
		})
		require.Eventually(t, func() bool { return p.Stats().Uses > 0 }, patient, time.Microsecond)
		o.kill()
		require.Contains(t, []status.Code{status.Failed, status.NotYetLink}, status.CodeOf(pushes.wait()))
		require.Zero(t, p.Stats().Uses)
		p.close()
	})
}

func TestTheDeathOfAPusherLeavesTheDestinationAlone(t *testing.T) {
	overProcesses(t, func(t *testing.T, o *owning, p *pulling) {
		o.tell("pushing")
		require.Eventually(t, func() bool { return p.Stats().Uses > 0 }, patient, time.Microsecond)
		o.kill()
		require.Eventually(t, func() bool { return p.links.LiveLinks() == 0 && p.Stats().Uses == 0 }, patient, time.Millisecond)
		clear(p.buffer.Bytes())
		successor := startOwner(t, "auto")
		require.NoError(t, p.link(successor.address)) // everything of the old link has ended by then
		require.Zero(t, p.Stats().Uses)
		require.Equal(t, len(p.buffer.Bytes()), bytes.Count(p.buffer.Bytes(), []byte{0}))
		p.close()
		successor.leave()
	})
}

// BenchmarkPushTiny is one block of 16 KiB of one tensor: a message there, the receiver's copy, and a message back.
func BenchmarkPushTiny(b *testing.B) {
	for _, way := range processWays {
		b.Run(way, func(b *testing.B) {
			o := startOwner(b, "auto")
			p := o.puller(way, time.Minute)
			call := &PushCall{
				Cluster: ownerCluster, Key: transport.Key{Kind: transport.KeyNormal, ID: cache.NoID}, Cache: p.id, TensorsPerLayer: 1,
				Plan: plan.Request{SrcTensors: plan.Range{Count: 1}, DstTensors: plan.Range{Count: 1}, SrcBlocks: []uint64{1}, DstBlocks: []uint64{2}},
			}
			b.SetBytes(ownerBlock)
			b.ReportAllocs()
			for b.Loop() {
				ctx, cancel := within(patient)
				if err := p.Push(ctx, call); err != nil {
					b.Fatal(err)
				}
				cancel()
			}
			p.close()
			o.leave()
		})
	}
}
