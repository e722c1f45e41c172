// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// CheckLocal says whether the request can be served into a cache of shape dst, as far as its own side can know: batch row, kind,
// size, block lists and tensor ranges (spec §8.5.2, rows 3 to 6 and 9 to 11). That tensors divide into layers is the caller's to
// check. The errors are PARAM_INVALID at stage check.
func CheckLocal(req *Request, dst Shape) error {
	if err := checkShape(dst, status.StageCheck, "local"); err != nil {
		return err
	}
	if rows := dst.rows(); req.DstBatch >= rows {
		return status.Newf(status.ParamInvalid, status.StageCheck,
			"destination batch %d is outside the local cache of %d batches", req.DstBatch, rows)
	}
	var err error
	if len(req.DstBlocks) == 0 {
		err = checkLocalRow(req, dst)
	} else {
		err = checkLocalBlocks(req, dst)
	}
	if err != nil {
		return err
	}
	return checkLocalTensors(req, dst)
}

func checkLocalRow(req *Request, dst Shape) error {
	switch {
	case len(req.SrcBlocks) > 0:
		return status.Newf(status.ParamInvalid, status.StageCheck, "%d source blocks but no destination blocks", len(req.SrcBlocks))
	case dst.Kind != Contiguous:
		return status.New(status.ParamInvalid, status.StageCheck, "a pull without destination blocks into a local cache of blocks")
	case req.Size != -1 && req.Size <= 0:
		return status.Newf(status.ParamInvalid, status.StageCheck, "size %d is neither -1 nor positive", req.Size)
	case req.DstOffset >= dst.Stride:
		return status.Newf(status.ParamInvalid, status.StageCheck,
			"destination offset %d is outside the local row of %d bytes", req.DstOffset, dst.Stride)
	case req.bytes(dst) > dst.Stride-req.DstOffset:
		return status.Newf(status.ParamInvalid, status.StageCheck,
			"size %d is larger than the local row of %d bytes%s", req.Size, dst.Stride, from(req.DstOffset))
	}
	return nil
}

// from says in an error from where in a row bytes are counted.
func from(offset uint64) string {
	if offset == 0 {
		return ""
	}
	return fmt.Sprintf(" from offset %d", offset)
}

func checkLocalBlocks(req *Request, dst Shape) error {
	if dst.Kind != Blocks {
		return status.Newf(status.ParamInvalid, status.StageCheck,
			"%d destination blocks, but the local cache is not one of blocks", len(req.DstBlocks))
	}
	if n := len(req.SrcBlocks); n != 0 && n != len(req.DstBlocks) {
		return status.Newf(status.ParamInvalid, status.StageCheck,
			"%d source blocks for %d destination blocks", n, len(req.DstBlocks))
	}
	if id, ok := outside(req.DstBlocks, dst.Count); ok {
		return status.Newf(status.ParamInvalid, status.StageCheck,
			"destination block %d is outside the local cache of %d blocks", id, dst.Count)
	}
	return nil
}

func checkLocalTensors(req *Request, dst Shape) error {
	if err := req.DstTensors.inside(dst, status.StageCheck, "destination", "local"); err != nil {
		return err
	}
	if req.SrcTensors.All {
		return nil
	}
	if have, want := req.SrcTensors.parts(), req.DstTensors.parts(); have != want && !req.DstTensors.All {
		return status.Newf(status.ParamInvalid, status.StageCheck, "a range of %d source parts for one of %d destination parts", have, want)
	}
	if have, want := req.SrcTensors.Tensors(dst), req.DstTensors.Tensors(dst); have != want {
		return status.Newf(status.ParamInvalid, status.StageCheck, "%d source tensors for %d destination tensors", have, want)
	}
	return nil
}

// CheckRemote says whether a request that passed [CheckLocal] with dst can be served from the owner's cache, of shape src (api.md
// §8.5.3; §8.6 for a one-sided request). Both shapes may be a peer's word. The errors are of stage lookup: CACHE_NOT_EXIST where
// the owner has no such batch row, PARAM_INVALID for everything else.
//
// A one-sided request need not fit the owner's kind: without source blocks a cache of blocks is one batch row of one block, at its
// base; with source blocks any tensor is an array of blocks of the local size, and only its bytes bound them.
func CheckRemote(req *Request, src, dst Shape) error {
	if err := checkShape(dst, status.StageLookup, "local"); err != nil {
		return err
	}
	if err := checkShape(src, status.StageLookup, "remote"); err != nil {
		return err
	}
	rows := src.rows()
	if len(req.SrcBlocks) > 0 {
		rows = 1
	}
	if req.SrcBatch >= rows {
		return status.Newf(status.CacheNotExist, status.StageLookup,
			"source batch %d is outside the remote cache of %d batches", req.SrcBatch, rows)
	}
	if err := checkRemoteTensors(req, src, dst); err != nil {
		return err
	}
	if len(req.SrcBlocks) > 0 {
		return checkRemoteBlocks(req, src, dst)
	}
	return checkRemoteRow(req, src, dst)
}

func checkRemoteTensors(req *Request, src, dst Shape) error {
	if have, want := req.SrcTensors.Tensors(src), req.DstTensors.Tensors(dst); have != want {
		return status.Newf(status.ParamInvalid, status.StageLookup,
			"%d tensors of the remote cache for %d of the local cache", have, want)
	}
	return req.SrcTensors.inside(src, status.StageLookup, "source", "remote")
}

func checkRemoteBlocks(req *Request, src, dst Shape) error {
	if !req.OneSided {
		if src.Kind != Blocks {
			return status.Newf(status.ParamInvalid, status.StageLookup,
				"%d source blocks, but the remote cache is not one of blocks", len(req.SrcBlocks))
		}
		if id, ok := outside(req.SrcBlocks, src.Count); ok {
			return status.Newf(status.ParamInvalid, status.StageLookup,
				"source block %d is outside the remote cache of %d blocks", id, src.Count)
		}
	}
	// Where the two block sizes differ this is the check that counts; where they are equal it says the same as the one above.
	if id, ok := outside(req.SrcBlocks, src.TensorBytes/dst.Stride); ok {
		return status.Newf(status.ParamInvalid, status.StageLookup,
			"source block %d is outside the remote tensor of %d bytes, in local blocks of %d bytes", id, src.TensorBytes, dst.Stride)
	}
	return nil
}

// checkRemoteRow bounds what is read from one batch row. In a pull into blocks every piece must begin inside the row; the last one
// may end with it (a row shorter than one block is such a piece).
func checkRemoteRow(req *Request, src, dst Shape) error {
	if src.Kind != Contiguous && !req.OneSided {
		return status.New(status.ParamInvalid, status.StageLookup, "a pull without source blocks from a remote cache of blocks")
	}
	if len(req.DstBlocks) == 0 {
		return checkRowFits(req, src, dst)
	}
	if n := uint64(len(req.DstBlocks)); n-1 > (src.Stride-1)/dst.Stride {
		return status.Newf(status.ParamInvalid, status.StageLookup,
			"%d destination blocks of %d bytes are more than the remote row of %d bytes fills", n, dst.Stride, src.Stride)
	}
	return nil
}

func checkRowFits(req *Request, src, dst Shape) error {
	if req.Whole {
		if src.Stride > dst.Stride {
			return status.Newf(status.ParamInvalid, status.StageLookup,
				"the remote row of %d bytes is larger than the local row of %d bytes", src.Stride, dst.Stride).
				Hinting("a pull by key moves whole rows of a cache, except where its seq_len_dim_index is 1")
		}
		return nil
	}
	if req.DstOffset >= dst.Stride {
		return status.Newf(status.ParamInvalid, status.StageLookup,
			"destination offset %d is outside the local row of %d bytes", req.DstOffset, dst.Stride)
	}
	if n := req.bytes(dst); req.SrcOffset > src.Stride || n > src.Stride-req.SrcOffset {
		return status.Newf(status.ParamInvalid, status.StageLookup,
			"size %d is larger than the remote row of %d bytes%s", n, src.Stride, from(req.SrcOffset))
	}
	return nil
}

// checkShape refuses a description that no cache can have, so that all later arithmetic stays inside [0, TensorBytes].
func checkShape(s Shape, stage status.Stage, side string) error {
	if s.Kind != Contiguous && s.Kind != Blocks {
		return status.Newf(status.ParamInvalid, stage, "the %s cache is of unknown kind %d", side, s.Kind)
	}
	if s.Tensors == 0 || s.Count == 0 || s.Stride == 0 || s.TensorBytes/s.Count != s.Stride {
		return status.Newf(status.ParamInvalid, stage, "the %s cache cannot be: %d tensors of %d bytes, %d times %d bytes each",
			side, s.Tensors, s.TensorBytes, s.Count, s.Stride)
	}
	return nil
}

// inside is [Range.Inside] in words.
func (r Range) inside(of Shape, stage status.Stage, end, side string) error {
	parts := r.parts()
	last := uint64(r.First) + uint64(r.Count) - 1
	switch {
	case r.Inside(of):
		return nil
	case r.Count == 0:
		return status.Newf(status.ParamInvalid, stage, "a range of no %s tensors, from %d", end, r.First)
	case parts == 1:
		return status.Newf(status.ParamInvalid, stage, "%s tensor %d is outside the %s cache of %d tensors", end, last, side, of.Tensors)
	case of.Tensors%parts != 0:
		return status.Newf(status.ParamInvalid, stage, "the %s cache of %d tensors has no %d equal parts", side, of.Tensors, parts)
	}
	return status.Newf(status.ParamInvalid, stage,
		"%s tensor %d is outside each of the %d parts of the %s cache, which have %d tensors", end, last, parts, side, of.Tensors/parts)
}

// rows of a tensor that a batch index can name (spec §8.1: a cache of blocks has one).
func (s Shape) rows() uint64 {
	if s.Kind == Blocks {
		return 1
	}
	return s.Count
}

// outside finds the first id that is not below limit.
func outside(ids []uint64, limit uint64) (uint64, bool) {
	for _, id := range ids {
		if id >= limit {
			return id, true
		}
	}
	return 0, false
}
