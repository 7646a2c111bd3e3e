package proxy
import ("testing";"net";"net/http";"io";"context";"net/netip";"github.com/elazarl/goproxy";"golang.org/x/sys/unix";"runtime";"fmt";"time")
func BenchmarkZGoproxy(b *testing.B) { zbench(b, func(l net.Listener){ http.Serve(l, goproxy.NewProxyHttpServer()) }) }
func BenchmarkZHijack(b *testing.B) { zbench(b, func(ln net.Listener){
 http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
   c, e := new(net.Dialer).DialContext(r.Context(), "tcp", r.Host)
   if e != nil { http.Error(w, e.Error(), 502); return }
   cl, _, _ := w.(http.Hijacker).Hijack()
   io.WriteString(cl, "HTTP/1.1 200 OK\r\n\r\n")
   a, s := cl.(*net.TCPConn), c.(*net.TCPConn)
   d := make(chan int)
   go func(){ io.Copy(s,a); s.CloseWrite(); close(d)}()
   io.Copy(a,s); a.CloseWrite(); <-d; a.Close(); s.Close()
 })) }) }
func zbench(b *testing.B, f func(net.Listener)) {
 l := quietLab(b); p := newRawPair(b, l)
 ln, _ := Listen(context.Background(), netip.MustParseAddrPort("10.77.0.1:0"))
 defer ln.Close()
 go f(ln)
 p.proxy.Port = ln.Addr().(*net.TCPAddr).Port
 b.ReportAllocs(); began := cpu()
 for b.Loop() {
		c, s := p.open(b)
		var buf [1]byte
		unix.Write(c, buf[:]); unix.Read(s, buf[:]); unix.Write(s, buf[:]); unix.Read(c, buf[:]); unix.Close(c); unix.Read(s, buf[:]); unix.Close(s)
 }
 b.ReportMetric(float64((cpu()-began).Microseconds())/float64(b.N), "cpu-µs/op")
}
func BenchmarkZDirect(b *testing.B) {
 l := quietLab(b); p := newRawPair(b, l)
 name,_ := unix.Getsockname(p.origin)
 began := cpu()
 for b.Loop() {
   c,_ := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
   unix.Connect(c, &unix.SockaddrInet4{Port: name.(*unix.SockaddrInet4).Port, Addr: [4]byte{198,18,0,2}})
   s,_,_ := unix.Accept4(p.origin, 0)
		var buf [1]byte
		unix.Write(c, buf[:]); unix.Read(s, buf[:]); unix.Write(s, buf[:]); unix.Read(c, buf[:]); unix.Close(c); unix.Read(s, buf[:]); unix.Close(s)
 }
 b.ReportMetric(float64((cpu()-began).Microseconds())/float64(b.N), "cpu-µs/op")
}
func TestZMem(t *testing.T) {
 l := quietLab(t); p := newRawPair(t, l)
 var m0, m1 runtime.MemStats
 p.open(t); runtime.GC(); runtime.GC(); runtime.ReadMemStats(&m0)
 fds := make([]int,0,4000)
 for range 2000 { c,s := p.open(t); var buf [1]byte; unix.Write(c,buf[:]); unix.Read(s,buf[:]); fds = append(fds,c,s) }
 time.Sleep(200*time.Millisecond)
 runtime.GC(); runtime.GC(); runtime.ReadMemStats(&m1)
 fmt.Println("heapalloc", float64(m1.HeapAlloc-m0.HeapAlloc)/2000, "heapinuse", float64(m1.HeapInuse-m0.HeapInuse)/2000, "stack", float64(m1.StackInuse-m0.StackInuse)/2000, "objs", float64(m1.HeapObjects-m0.HeapObjects)/2000)
 for _,f := range fds { unix.Close(f) }
}
