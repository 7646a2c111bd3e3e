package main
import ("testing";"time";"os";"strings")
func TestLat(t *testing.T){
 w:=newWorld(t)
 for _,env:=range []string{"X=1","GOGC=off"} {
 os.Remove(w.config+"/perimeter/alice-x.tokens")
 for range 5 { t0:=time.Now();
   c:=w.command("vpn","up"); c.Env=append(c.Env,env); o,_:=c.CombinedOutput(); d:=time.Since(t0); w.vpn(0,"down")
   var first string; for _,l:=range strings.Split(string(o),"\n"){ if strings.Contains(l," ms"){first+=l+"; "}}
   t.Logf("%s %v %s",env,d,first)
   if strings.Contains(env,"GODEBUG") { b,_:=os.ReadFile(os.Getenv("X")); _=b; t.Log(string(o)); break } 
   m,_:=os.ReadDir(w.config+"/perimeter"); for _,f:=range m { if strings.HasSuffix(f.Name(),".tokens"){os.Remove(w.config+"/perimeter/"+f.Name())}}
 } }
}
