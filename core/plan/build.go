// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"slices"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// MaxSegments bounds the list of one request (PARAM_INVALID beyond it). Block lists of one control frame times the tensors of a
// cache could otherwise make a peer allocate gigabytes: this many segments are 512 MiB. It leaves room for a context of a million
// tokens in blocks of 16, scattered, in 256 tensors.
const MaxSegments = 1 << 24

// Build checks the request as [CheckLocal] and [CheckRemote] do and lists the bytes to move, tensor pair by tensor pair and within
// one in the order of the request. Pieces that are neighbours on both sides become one segment, never across tensors.
//
// The list overwrites `into` from its start; nothing is allocated where its capacity suffices. It holds at least one segment, no
// segment is empty, and each lies inside [0, TensorBytes) of both sides. With an error the list is empty (into[:0]).
func Build(req *Request, src, dst Shape, into []Segment) ([]Segment, error) {
	out := into[:0]
	if err := CheckLocal(req, dst); err != nil {
		return out, err
	}
	if err := CheckRemote(req, src, dst); err != nil {
		return out, err
	}
	if len(req.DstBlocks) == 0 {
		out = append(out, contiguous(req, src, dst))
	} else {
		out = appendPieces(out, req, src, dst)
	}
	tensors := req.DstTensors.Tensors(dst)
	if uint64(len(out)) > MaxSegments/tensors {
		return out[:0], status.Newf(status.ParamInvalid, status.StageCheck,
			"%d pieces in each of %d tensors are more than the %d that one request may have", len(out), tensors, MaxSegments)
	}
	return spread(out, req, src, dst), nil
}

// contiguous is the one segment of a pull from batch row to batch row, in the first pair of tensors. The checks have bounded it.
func contiguous(req *Request, src, dst Shape) Segment {
	row := Segment{SrcOffset: req.SrcBatch * src.Stride, DstOffset: req.DstBatch * dst.Stride, Bytes: src.Stride}
	if !req.Whole {
		row.SrcOffset += req.SrcOffset
		row.DstOffset += req.DstOffset
		row.Bytes = req.bytes(dst)
	}
	return row
}

// appendPieces lists a pull into blocks for the first pair of tensors. Block bytes are the local ones on both sides; a source row is
// cut into blocks, the last of which may be short. No step overflows: the checks have put every piece inside both tensors.
func appendPieces(out []Segment, req *Request, src, dst Shape) []Segment {
	block := dst.Stride
	row := req.SrcBatch * src.Stride
	last := -1
	for i, id := range req.DstBlocks {
		piece := Segment{DstOffset: id * block, Bytes: block}
		if len(req.SrcBlocks) > 0 {
			piece.SrcOffset = req.SrcBlocks[i] * block
		} else {
			done := uint64(i) * block
			piece.SrcOffset = row + done
			piece.Bytes = min(block, src.Stride-done)
		}
		if last >= 0 && out[last].precedes(piece) {
			out[last].Bytes += piece.Bytes
			continue
		}
		out = append(out, piece)
		last++
	}
	return out
}

// precedes says whether next begins where s ends, on both sides.
func (s *Segment) precedes(next Segment) bool {
	return s.SrcOffset+s.Bytes == next.SrcOffset && s.DstOffset+s.Bytes == next.DstOffset
}

// spread repeats the runs of the first pair of tensors for the others, which have the same shape.
func spread(out []Segment, req *Request, src, dst Shape) []Segment {
	runs, tensors := len(out), int(req.DstTensors.Tensors(dst))
	out = slices.Grow(out, runs*(tensors-1))[:runs*tensors]
	first := out[:runs]
	for k := range tensors {
		srcTensor, dstTensor := req.SrcTensors.Nth(uint32(k), src), req.DstTensors.Nth(uint32(k), dst)
		pair := out[k*runs:][:runs]
		for i := range pair {
			to, run := &pair[i], &first[i] // a composite literal here takes four times as long
			to.SrcTensor, to.DstTensor = srcTensor, dstTensor
			to.SrcOffset, to.DstOffset, to.Bytes = run.SrcOffset, run.DstOffset, run.Bytes
		}
	}
	return out
}

// Total is the sum of the segments' bytes. It saturates at the largest uint64.
func Total(segments []Segment) uint64 {
	var sum uint64
	for i := range segments {
		next := sum + segments[i].Bytes
		if next < sum {
			return ^uint64(0)
		}
		sum = next
	}
	return sum
}

// bytes of one tensor that a contiguous pull moves, unless it is Whole. The destination's offset lies inside its row.
func (r *Request) bytes(dst Shape) uint64 {
	if r.Size > 0 {
		return uint64(r.Size)
	}
	return dst.Stride - r.DstOffset
}
