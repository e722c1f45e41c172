// SPDX-License-Identifier: Apache-2.0

package plan

import "github.com/llm-datadist-open/llm-datadist/core/status"

// CheckSource says whether a push can be served from a cache of shape src, as far as the pusher can know before its peer looks at the
// destination: tensor range, batch row, blocks, and the bytes of a destination block (0: not said; a row that is cut into blocks needs
// them). That tensors divide into layers is the caller's to check. The errors are PARAM_INVALID at stage check.
func CheckSource(req *Request, src Shape, blockBytes uint64) error {
	if err := checkShape(src, status.StageCheck, "local"); err != nil {
		return err
	}
	if err := req.SrcTensors.inside(src, status.StageCheck, "source", "local"); err != nil {
		return err
	}
	if rows := src.rows(); req.SrcBatch >= rows {
		return status.Newf(status.ParamInvalid, status.StageCheck, "source batch %d is outside the local cache of %d batches", req.SrcBatch, rows)
	}
	switch {
	case len(req.SrcBlocks) > 0:
		return checkSourceBlocks(req, src, blockBytes)
	case len(req.DstBlocks) > 0:
		return checkSourceRow(req, src, blockBytes)
	}
	return nil
}

func checkSourceBlocks(req *Request, src Shape, blockBytes uint64) error {
	switch n := len(req.SrcBlocks); {
	case src.Kind != Blocks:
		return status.Newf(status.ParamInvalid, status.StageCheck, "%d source blocks, but the local cache is not one of blocks", n)
	case n != len(req.DstBlocks):
		return status.Newf(status.ParamInvalid, status.StageCheck, "%d source blocks for %d destination blocks", n, len(req.DstBlocks))
	case blockBytes > 0 && blockBytes != src.Stride:
		return status.Newf(status.ParamInvalid, status.StageCheck,
			"destination blocks of %d bytes for source blocks of %d bytes", blockBytes, src.Stride)
	}
	if id, ok := outside(req.SrcBlocks, src.Count); ok {
		return status.Newf(status.ParamInvalid, status.StageCheck, "source block %d is outside the local cache of %d blocks", id, src.Count)
	}
	return nil
}

// checkSourceRow bounds a row that is cut into blocks: every piece must begin inside the row.
func checkSourceRow(req *Request, src Shape, blockBytes uint64) error {
	if blockBytes == 0 || blockBytes >= src.TensorBytes {
		return status.Newf(status.ParamInvalid, status.StageCheck,
			"destination blocks of %d bytes for a source tensor of %d bytes", blockBytes, src.TensorBytes)
	}
	if n := uint64(len(req.DstBlocks)); n-1 > (src.Stride-1)/blockBytes {
		return status.Newf(status.ParamInvalid, status.StageCheck,
			"%d destination blocks of %d bytes are more than the source row of %d bytes fills", n, blockBytes, src.Stride)
	}
	return nil
}
