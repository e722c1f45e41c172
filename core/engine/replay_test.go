// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bufio"
	"encoding/json"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// recorded holds the pulls of a connector whose prefill process was killed and restarted; tests/test_connector.py writes it.
const recorded = "../../tests/data/connector.jsonl"

// recording is the first line of the file: the connector's threads and its groups of layers.
type recording struct {
	Threads int
	Groups  []struct {
		Tensors       uint32
		PerLayer      uint32 `json:"per_layer"`
		BlockBytes    int64  `json:"block_bytes"`
		PrefillBlocks int64  `json:"prefill_blocks"`
		DecodeBlocks  int64  `json:"decode_blocks"`
	}
	pulls []recordedPull
}

// recordedPull is each further line: one pull, in the order in which they ended.
type recordedPull struct {
	Thread, Group int
	Incarnation   uint64  // of the prefill worker that had filled the blocks
	Layer         *uint32 // nil: all
	Src, Dst      []uint64
	Code          string // how it ended
}

func (p *recordedPull) succeeded() bool { return p.Code == status.Success.String() }

func readRecording(t *testing.T) *recording {
	t.Helper()
	file, err := os.Open(recorded)
	require.NoError(t, err)
	defer func() { _ = file.Close() }()
	lines := json.NewDecoder(bufio.NewReader(file))
	out := new(recording)
	require.NoError(t, lines.Decode(out))
	for lines.More() {
		var pull recordedPull
		require.NoError(t, lines.Decode(&pull))
		out.pulls = append(out.pulls, pull)
	}
	return out
}

// The pulls of a real connector, with its sizes and its threads, for the race detector: what succeeded there succeeds here with every
// byte right, and what was lost when the prefill process died is lost here, before its successor is linked to.
func TestTheRecordedPullsOfAConnectorAreReplayed(t *testing.T) {
	over(t, []way{overTCP, overSHM, overFabric, overDirect}, func(w *world) {
		r := &replay{w: w, recording: readRecording(w.t), puller: w.node("puller", 2)}
		r.prepare()
		r.start(1)
		r.puller.link(r.owner)
		r.each(1, true, r.pull)
		losing := begin(func() error { r.each(1, false, r.lose); return nil })
		r.owner.crash()
		require.NoError(w.t, losing.wait())
		r.start(2)
		r.each(2, false, r.lose)
		require.NoError(w.t, r.puller.unlink(r.owner, true))
		r.puller.link(r.owner)
		r.each(2, true, r.pull)
	})
}

// replay is two engines that do what a recording says.
type replay struct {
	*recording
	w             *world
	owner, puller *node
	sources       []*memory // by group
	contents      [][][]byte
	targets       [][]*memory // by thread and group: blocks that are one thread's alone
}

func (r *replay) prepare() {
	r.targets = make([][]*memory, r.Threads)
	for thread := range r.targets {
		for _, g := range r.Groups {
			r.targets[thread] = append(r.targets[thread], r.puller.register(blocks(g.Tensors, g.DecodeBlocks, g.BlockBytes)))
		}
	}
}

// start starts the owner, whose blocks have a content that is its incarnation's alone.
func (r *replay) start(incarnation uint64) {
	r.owner = r.w.node("owner", 1)
	r.sources, r.contents = nil, nil
	for model, g := range r.Groups {
		key := cache.Key{ID: cache.NoID, Model: uint64(model)}
		source := r.owner.register(blocks(g.Tensors, g.PrefillBlocks, g.BlockBytes), key).fill(100*incarnation + uint64(model))
		r.sources, r.contents = append(r.sources, source), append(r.contents, source.content())
	}
}

// each does the pulls of one incarnation that ended well, or those that did not, each on its own thread.
func (r *replay) each(incarnation uint64, succeeded bool, do func(*recordedPull)) {
	together(r.Threads, func(thread int) {
		for i := range r.pulls {
			if p := &r.pulls[i]; p.Thread == thread && p.Incarnation == incarnation && p.succeeded() == succeeded {
				do(p)
			}
		}
	})
}

func (r *replay) request(p *recordedPull) plan.Request {
	request := all()
	request.SrcBlocks, request.DstBlocks = p.Src, p.Dst
	if p.Layer != nil {
		n := r.Groups[p.Group].PerLayer
		request.SrcTensors = plan.Range{First: *p.Layer * n, Count: n}
		request.DstTensors = request.SrcTensors
	}
	return request
}

func (r *replay) try(p *recordedPull) error {
	ctx, cancel := within(patient)
	defer cancel()
	return r.puller.Pull(ctx, &PullCall{
		Cluster: r.owner.id, Key: blocksKey(uint64(p.Group)), Cache: r.targets[p.Thread][p.Group].id, Plan: r.request(p),
		TensorsPerLayer: r.Groups[p.Group].PerLayer,
	})
}

func (r *replay) pull(p *recordedPull) {
	target := r.targets[p.Thread][p.Group]
	want := target.after(r.request(p), r.contents[p.Group], r.sources[p.Group].desc, 0)
	require.NoError(r.w.t, r.try(p))
	require.True(r.w.t, target.equals(want), "wrong bytes")
}

// lose pulls until the owner's death is noticed.
func (r *replay) lose(p *recordedPull) {
	err := r.try(p)
	for err == nil {
		err = r.try(p)
	}
	require.Contains(r.w.t, []status.Code{status.NotYetLink, status.Failed, status.CacheNotExist}, status.CodeOf(err), "%v", err)
}
