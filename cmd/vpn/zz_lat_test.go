package main
import ("testing";"os/exec";"os";"fmt")
func TestLat(t *testing.T){
 w:=newWorld(t)
 c:=exec.Command("nsenter","-t",fmt.Sprint(w.clientPID),"-n","strace","-f","-ttt","-e","trace=execve,openat,sendmmsg,sendto,sendmsg,connect,clone,clone3,vfork,ioctl,write,flock,exit_group,socket","-o","/tmp/st.txt",w.bin+"/vpn","up")
 c.Env = append(os.Environ(), "XDG_CONFIG_HOME="+w.config, "XDG_RUNTIME_DIR="+w.config+"/run")
 c.Run(); w.vpn(0,"down")
}
