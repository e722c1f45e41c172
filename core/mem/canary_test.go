// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

func newCanary(t testing.TB) *Canary {
	c, err := NewCanary()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

func TestCanary(t *testing.T) {
	a, b := newCanary(t), newCanary(t)
	value := a.Value()
	require.Equal(t, value[:], View(a.Addr(), 16))
	require.NotEqual(t, a.Value(), b.Value())
	require.NotEqual(t, a.Addr(), b.Addr())
	require.Contains(t, areaFacts(t, a.Addr())["VmFlags"], "dc", "not copied into a forked child")
	addr := a.Addr()
	require.NoError(t, a.Close())
	require.NoError(t, a.Close())
	_, err := ProbeWritable([]Span{{addr, 16}})
	require.ErrorIs(t, err, status.ParamInvalid)
}
