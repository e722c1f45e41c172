// SPDX-License-Identifier: Apache-2.0

package shm

import (
	"errors"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
)

// kernel is a permission whose module is made up; it keeps what it was told.
type kernel struct {
	permission
	told []int
	fail error
}

func newKernel(asks bool) *kernel {
	k := &kernel{}
	k.asks = func() bool { return asks }
	k.grant = func(pid int) error {
		if k.fail == nil {
			k.told = append(k.told, pid)
		}
		return k.fail
	}
	return k
}

func TestOnePeerIsPermittedUntilItsLastLinkEnds(t *testing.T) {
	k := newKernel(true)
	early := k.permit(100)
	other := k.permit(200) // comes second
	late := k.permit(100)  // a link of another engine with the same process
	require.Equal(t, []int{100}, k.told)
	other()
	early()
	early() // once is what counts
	require.Equal(t, []int{100}, k.told, "a link with the process is left")
	waiting := k.permit(200)
	late()
	require.Equal(t, []int{100, 0}, k.told)
	next := k.permit(200)
	waiting() // never had it
	require.Equal(t, []int{100, 0, 200}, k.told)
	next()
	require.Equal(t, []int{100, 0, 200, 0}, k.told)
}

func TestNobodyIsPermittedWhereThatIsNotNeeded(t *testing.T) {
	k := newKernel(false)
	k.permit(100)()
	require.Empty(t, k.told)
	k = newKernel(true)
	k.permit(os.Getpid())() // an engine of the same process
	k.permit(0)()           // a process that is not visible from here
	require.Empty(t, k.told)
}

func TestAPermissionThatCanNotBeGivenIsNobodys(t *testing.T) {
	k := newKernel(true)
	k.fail = errors.New("refused")
	forbid := k.permit(100)
	k.fail = nil
	forbid()
	require.Empty(t, k.told)
	k.permit(200)()
	require.Equal(t, []int{200, 0}, k.told)
}
