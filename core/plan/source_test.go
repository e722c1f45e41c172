// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

func TestCheckSource(t *testing.T) {
	row, paged := shape(Contiguous, 2, 3, 100), shape(Blocks, 2, 8, 40)
	for _, c := range []struct {
		cause      string // "": it can be served
		src        Shape
		req        Request
		blockBytes uint64
	}{
		{"", row, Request{SrcBatch: 2}, 0},
		{"", row, Request{SrcTensors: Range{First: 1, Count: 1}}, 0},
		{"", row, Request{SrcBatch: 1, DstBlocks: []uint64{9, 0, 7}}, 40},
		{"", row, Request{DstBlocks: []uint64{9}}, 150},
		{"", paged, Request{}, 0},
		{"", paged, Request{SrcBlocks: []uint64{7, 0, 7}, DstBlocks: []uint64{1, math.MaxUint64, 2}}, 40},
		{"cannot be", Shape{Kind: Contiguous, Tensors: 1, Count: 1}, Request{}, 0},
		{"source tensor 2 is outside the local cache of 2 tensors", row, Request{SrcTensors: Range{First: 1, Count: 2}}, 0},
		{"a range of no source tensors", row, Request{SrcTensors: Range{First: 1}}, 0},
		{"source batch 3 is outside the local cache of 3 batches", row, Request{SrcBatch: 3}, 0},
		{"source batch 1 is outside the local cache of 1 batches", paged, Request{SrcBatch: 1}, 0},
		{"destination blocks of 0 bytes", row, Request{DstBlocks: []uint64{0}}, 0},
		{"destination blocks of 300 bytes", row, Request{DstBlocks: []uint64{0}}, 300},
		{"4 destination blocks of 40 bytes are more than the source row of 100 bytes fills", row, Request{DstBlocks: []uint64{0, 1, 2, 3}}, 40},
		{"1 source blocks, but the local cache is not one of blocks", row, Request{SrcBlocks: []uint64{0}, DstBlocks: []uint64{0}}, 0},
		{"1 source blocks for 2 destination blocks", paged, Request{SrcBlocks: []uint64{0}, DstBlocks: []uint64{0, 1}}, 0},
		{"1 source blocks for 0 destination blocks", paged, Request{SrcBlocks: []uint64{0}}, 0},
		{"destination blocks of 20 bytes for source blocks of 40 bytes", paged, Request{SrcBlocks: []uint64{0}, DstBlocks: []uint64{0}}, 20},
		{"source block 8 is outside the local cache of 8 blocks", paged, Request{SrcBlocks: []uint64{8}, DstBlocks: []uint64{0}}, 0},
	} {
		if c.req.SrcTensors == (Range{}) {
			c.req.SrcTensors = all
		}
		err := CheckSource(&c.req, c.src, c.blockBytes)
		if c.cause == "" {
			require.NoError(t, err)
			continue
		}
		require.ErrorIs(t, err, status.ParamInvalid)
		require.ErrorContains(t, err, c.cause)
		require.Equal(t, status.StageCheck, status.From(err, "").Stage)
	}
}
