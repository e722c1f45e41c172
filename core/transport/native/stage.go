// SPDX-License-Identifier: Apache-2.0

package native

import (
	"fmt"
	"math/bits"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// A row into blocks is nothing that the library does. It is pulled into a stage, device memory that the library knows as a cache of one row,
// and the device copies it from there.

// stageAlignment is what devices like their tensors to begin at.
const stageAlignment = 512

// stage is device memory that is registered with the library.
type stage struct {
	memory mem.Memory
	shape  plan.Shape // one row
	id     int64
}

// tensorStep is how far apart the tensors of a stage are.
func tensorStep(rowBytes uint64) uint64 {
	return (rowBytes + stageAlignment - 1) &^ (stageAlignment - 1)
}

// stageJob makes a job for a stage of one of a pull.
func (s *Session) stageJob(j *job, req *transport.Request, local transport.Local, r *transport.Resolved) error {
	p := &req.Plan
	over, wanted := bits.Mul64(uint64(len(p.DstBlocks)), req.Local.Stride)
	if over != 0 {
		wanted = r.Shape.Stride
	}
	bytes := min(wanted, r.Shape.Stride)
	tensors := uint32(p.SrcTensors.Tensors(r.Shape))
	segments, err := plan.Build(p, r.Shape, req.Local, nil)
	if err != nil {
		return err
	}
	j.staged, j.into = true, local.Backing
	row := bytes
	if r.Batch > 0 { // the library finds the peer's row by the length of ours
		row = r.Shape.Stride
	}
	j.shape = plan.Shape{Kind: plan.Contiguous, Tensors: tensors, TensorBytes: row, Stride: row, Count: 1}
	j.transfer.Bytes, j.transfer.LocalRow = bytes, 0
	if !j.transfer.SrcTensors.All {
		j.transfer.DstTensors = plan.Range{Count: tensors}
	}
	first := p.SrcTensors.Nth(0, r.Shape)
	for _, g := range segments {
		j.moves = append(j.moves, mem.Move{
			Dst:   local.Addrs[g.DstTensor] + uintptr(g.DstOffset),
			Src:   uintptr(uint64(g.SrcTensor-first)*tensorStep(row) + g.SrcOffset - r.Batch*r.Shape.Stride),
			Bytes: g.Bytes,
		})
	}
	return nil
}

// stageOf returns a stage of a shape, the one of the pull before where that will do. Where there is no memory for it, or the library does not
// take it, the pull is streamed. Called with the token.
func (s *Session) stageOf(shape plan.Shape) (*stage, error) {
	if s.stage != nil && s.stage.shape == shape {
		return s.stage, nil
	}
	if s.stage != nil {
		s.stage.free(s.cfg.Hub)
		s.stage = nil
	}
	over, bytes := bits.Mul64(uint64(shape.Tensors), tensorStep(shape.Stride))
	if over != 0 {
		return nil, errStreamed
	}
	memory, err := s.cfg.Device.Reserve(bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errStreamed, err)
	}
	addrs := make([]uintptr, shape.Tensors)
	for i := range addrs {
		addrs[i] = memory.Addr() + uintptr(uint64(i)*tensorStep(shape.Stride))
	}
	id, err := s.cfg.Hub.Register(shape, true, addrs)
	if err != nil {
		_ = memory.Close() // nobody has seen it
		return nil, fmt.Errorf("%w: %w", errStreamed, err)
	}
	s.stage = &stage{memory: memory, shape: shape, id: id}
	return s.stage, nil
}

// free gives a stage back, of which no transfer is under way. What the library and the device say to that changes nothing.
func (st *stage) free(hub *Hub) {
	_ = hub.Unregister(st.id)
	_ = st.memory.Close()
}
